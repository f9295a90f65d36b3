"""What a user's loss declares and returns is checked."""

import pytest
import torch
from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss, check_needs, element_losses
from rlhf_pl.algorithms.prompt_groups import PromptGroups
from rlhf_pl.utils.errors import InputError


class Users(PolicyLoss):
    def __init__(self, values: Tensor, **declared: object) -> None:
        self.values = values
        vars(self).update(declared)

    def losses(self, groups: PromptGroups) -> Tensor:
        return self.values


class Finished(Users):
    def counts(self, lengths: Tensor, finished: Tensor) -> Tensor:
        return finished.long()


def two_groups() -> PromptGroups:
    """Two groups of two responses of two tokens."""
    ones, lengths = torch.ones(4), torch.full((4,), 2)
    return PromptGroups(torch.ones(8), ones, ones, lengths, lengths > 0, torch.tensor([2, 2]), {})


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"per": "sequence"}, "Users.per is 'sequence'. Available: pair, group, response, token"),
        ({"needs": "rewards"}, r"Users.needs is a string. Write a set: needs = \{'rewards'\}"),
    ],
)
def test_a_wrong_declaration_is_refused(declared: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_needs(Users(torch.ones(2), **declared), 0.0)


@pytest.mark.parametrize("per", ["pair", "group", "response", "token"])
def test_values_must_have_the_declared_shape(per: str) -> None:
    groups, elements = two_groups(), {"pair": 2, "group": 2, "response": 4, "token": 8}[per]
    assert len(element_losses(Users(torch.ones(elements), per=per), groups)) == elements
    for values in (torch.tensor(1.0), torch.ones(elements - 1), torch.ones(elements, 1)):
        with pytest.raises(InputError, match=f"return one value per {per}, not reduced"):
            element_losses(Users(values, per=per), groups)


def test_elements_that_do_not_count_may_be_left_out() -> None:
    assert len(element_losses(Finished(torch.ones(3), per="response"), two_groups())) == 3
    with pytest.raises(InputError, match="Finished returned values of shape"):
        element_losses(Finished(torch.ones(5), per="response"), two_groups())


def test_something_else_than_a_loss_is_refused() -> None:
    with pytest.raises(InputError, match=r"`model\.loss` must be a PolicyLoss, got None\."):
        check_needs(None, 0.0)  # type: ignore[arg-type]
