"""What a loss computes of a whole round before it trains: a number for each response or token."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rlhf_pl.algorithms.policy_loss import PolicyLoss
from rlhf_pl.data.stored_groups import StoredGroups
from rlhf_pl.utils.errors import InputError


class RoundValues:
    """Numbers of the responses or tokens of a round's groups, by name.

    Args:
        groups: The groups.
        values: Shape (R,) or (M,), for the groups' R responses or M tokens, group by group.

    Raises:
        InputError: A shape is another one.
    """

    def __init__(self, groups: StoredGroups, values: Mapping[str, Tensor]) -> None:
        lengths = groups.response_lengths().astype(np.int64)[groups.members]
        self._responses = np.concatenate([[0], np.cumsum(groups.sizes)])  # responses before each group
        self._tokens = np.concatenate([[0], np.cumsum(lengths)])[self._responses]
        self.values = dict(values)
        self._starts: dict[str, np.ndarray] = {}
        for name, tensor in self.values.items():
            starts = {int(ends[-1]): ends for ends in (self._tokens, self._responses)}.get(tensor.numel())
            if starts is None or tensor.dim() != 1:
                raise InputError(
                    f"`model.loss` computed `{name}` of shape {tuple(tensor.shape)}, for {self._responses[-1]} "
                    f"responses of {self._tokens[-1]} tokens. Return a number for each response or for each token."
                )
            self._starts[name] = starts

    def select(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The numbers of the groups at `indices`, one after the other."""
        return {
            name: torch.cat([values[self._starts[name][i] : self._starts[name][i + 1]] for i in indices])
            for name, values in self.values.items()
        }


def check_round_values(loss: PolicyLoss, values: Mapping[str, Tensor]) -> None:
    """Raise InputError if a loss did not compute what its `round_values` names, or if it is not finite."""
    name = type(loss).__name__
    if set(values) != set(loss.round_values):
        raise InputError(
            f"`model.loss`: {name}.of_round returned {sorted(values)}, but its `round_values` names "
            f"{sorted(loss.round_values)}."
        )
    for key, tensor in values.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"`model.loss`: the `{key}` that {name} computed of the round are not finite. Scale the rewards "
                "(--rollout.shaping.normalize round)."
            )
