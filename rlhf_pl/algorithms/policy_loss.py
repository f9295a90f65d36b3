"""What every loss of a policy is: what it needs, over what its mean is taken, and what is logged of it."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import NEEDS, PER_TOKEN, SUMMED, Element, PromptGroups
from rlhf_pl.utils.errors import InputError


class PolicyLoss(ABC):
    """A loss on prompt groups. Subclass it and name your class in `model.loss.class_path`.

    An update's gradient is that of the mean over all elements of the update, whatever the micro-batches and ranks that
    they were divided into. Log-probs that `needs` does not name are not computed.

    Attributes:
        needs: What the loss reads, of `rewards`, `old_logps`, `reference_logps` (summed over each response),
            `old_token_logps` and `reference_token_logps`.
        per: What an element of the loss stands for. With `pair`, the selector's pairs are trained on; else all scored
            responses of a prompt, in one micro-batch.
        metric_names: Names of what `metrics` returns.
    """

    needs: ClassVar[Collection[str]] = frozenset({"rewards", "old_logps"})
    per: ClassVar[Element] = "group"
    metric_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def losses(self, groups: PromptGroups) -> Tensor:
        """The loss of every pair, group, response or token, as `per` says; shape (pairs,), (G,), (R,) or (M,)."""

    def metrics(self, groups: PromptGroups) -> dict[str, Tensor]:
        """What is logged beside the loss, as means over all elements of an update: tensors of any shape by name."""
        return {}

    def counts(self, lengths: Tensor, finished: Tensor) -> Tensor:
        """How many elements each response has in the mean over an update, shape (R,); for `response` and `token`.

        Override it where some do not count, such as those of truncated responses, and leave them out of `losses`.

        Args:
            lengths: Tokens of each response, shape (R,), int64.
            finished: Whether it ended with an EOS, shape (R,), bool.
        """
        return lengths if self.per == "token" else torch.ones_like(lengths)


class PairwiseLoss(PolicyLoss):
    """A loss on (chosen, rejected) pairs. Subclass it and name your class in `model.loss.class_path`.

    The log-ratios are those to the policy that sampled the round; where `needs` names `reference_logps` and not
    `old_logps`, those to the fixed reference.
    """

    per: ClassVar[Element] = "pair"

    @abstractmethod
    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        """Loss per pair, shape (B,), not reduced; arguments as in `rebel_loss`."""

    def losses(self, groups: PromptGroups) -> Tensor:
        base = groups.old_logps if "old_logps" in self.needs else groups.reference_logps
        chosen, rejected = groups.pairs(groups.logps - base)
        return self(chosen, rejected, reward_margins(groups))


def reward_margins(groups: PromptGroups) -> Tensor:
    """Of each pair the chosen minus the rejected reward, shape (pairs,)."""
    chosen, rejected = groups.pairs(groups.rewards)
    return chosen - rejected


def check_needs(loss: PolicyLoss, kl_coef: float) -> frozenset[str]:
    """What a loss needs, with that of the KL penalty in the reward; per-token log-probs come with their sums.

    Raises:
        InputError: It needs what there is not, or takes no rewards that a KL penalty could be in.
    """
    name, needs = type(loss).__name__, frozenset(loss.needs)
    if unknown := sorted(needs - set(NEEDS)):
        raise InputError(f"`model.loss`: {name} needs {', '.join(unknown)}. There are: {', '.join(NEEDS)}.")
    needs |= {summed for summed, per_token in zip(SUMMED, PER_TOKEN, strict=True) if per_token in needs}
    if kl_coef == 0:
        return needs
    if "rewards" not in needs:
        raise InputError(
            f"`model.kl_coef` is {kl_coef}, but `model.loss` {name} takes no rewards, which the KL penalty is in, so "
            "it would have no effect. Set it to 0."
        )
    return needs | set(SUMMED)


def logged_names(loss: PolicyLoss, needs: Collection[str]) -> tuple[str, ...]:
    """Names of what is logged of a loss with every update: that of `logged`, with means and variances of ratios."""
    pairs, old = loss.per == "pair", "old_logps" in needs
    names: tuple[str, ...] = ("loss",)
    if old:
        names += ("kl", *(("kl_chosen", "kl_rejected") if pairs else ()), "ratio_mean", "ratio_var")
    if pairs and (old or "reference_logps" in needs):
        names += ("logratio_margin", "reward_margin", "sign_align")
    return (*names, *loss.metric_names)


@torch.no_grad()
def logged(loss: PolicyLoss, groups: PromptGroups) -> dict[str, Tensor]:
    """What is logged beside the loss, as far as log-probs of other policies are there: tensors by name.

    `ratio` and `ratio_square` are those of pi_theta / pi_old - 1: about 0, so that variances as small as rounding's are
    not lost in it.
    """
    stored, pairs = groups.stored, loss.per == "pair"
    parts: dict[str, Tensor] = {}
    if "old_logps" in stored:
        logratios = groups.logps - groups.old_logps
        parts = _of_pairs(groups, logratios) if pairs else _of_responses(logratios)
    if pairs and stored:
        parts |= _margins(groups, groups.logps - stored["old_logps" if "old_logps" in stored else "reference_logps"])
    return {**parts, **loss.metrics(groups)}


def _of_responses(logratios: Tensor) -> dict[str, Tensor]:
    ratios = logratios.expm1()
    return {"kl": -logratios, "ratio": ratios, "ratio_square": ratios.square()}


def _of_pairs(groups: PromptGroups, logratios: Tensor) -> dict[str, Tensor]:
    both, ratios = groups.pairs(logratios), groups.pairs(logratios.expm1())
    return {
        "kl": -both.mean(0),
        "kl_chosen": -both[0],
        "kl_rejected": -both[1],
        "ratio": ratios.mean(0),
        "ratio_square": ratios.square().mean(0),
    }


def _margins(groups: PromptGroups, logratios: Tensor) -> dict[str, Tensor]:
    chosen, rejected = groups.pairs(logratios)
    rewards = reward_margins(groups)
    return {
        "logratio_margin": chosen - rejected,
        "reward_margin": rewards,
        "sign_align": ((chosen - rejected).sign() == rewards.sign()).float(),
    }
