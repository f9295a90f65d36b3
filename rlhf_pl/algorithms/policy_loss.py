"""Base classes of policy losses: what a loss needs, what its mean is taken over, and what is logged."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import (
    NEEDS,
    OLD_VALUES,
    PER_TOKEN,
    SAMPLING_LOGPS,
    SUMMED,
    Z_REF,
    Element,
    PromptGroups,
)
from rlhf_pl.algorithms.round_facts import Choice, RoundFacts
from rlhf_pl.utils.errors import InputError


class PolicyLoss(ABC):
    """A loss on prompt groups. Subclass it and name your class in `model.loss.class_path`.

    An update's gradient is that of the mean over all elements of the update, however these are divided into
    micro-batches and among ranks. Log-probs that `needs` does not name are not computed.

    Attributes:
        needs: What the loss reads, from `rewards`, `old_logps`, `reference_logps` (summed over each response),
            `old_token_logps` and `reference_token_logps`; `sampling_token_logps`, of the policy that sampled the
            responses, in `PromptGroups.stored`; `kto_z_ref`, the mean log-ratio to the reference of an
            update's responses to other prompts, or 0 if that is negative, without gradient, in `PromptGroups.stored`;
            and from the module's `extra_passes`, which are there by name, a number per token.
        per: The element that the loss returns a value for. With `pair`, the policy trains on the selector's pairs, and
            a prompt counts once, whatever its number of pairs; otherwise on all scored responses to a prompt.
        on_pairs: Whether a loss per response or token needs the selector's pairs as well, as one on chosen responses.
        rewards_as_labels: Whether rewards only tell which responses of a prompt are the better ones, so that their
            values do not matter; offline pairs then need none.
        kl_per_token: Whether every token has its own part of the KL penalty, by `PromptGroups.token_rewards`, so that
            `model.kl_coef` needs the log-probs of tokens.
        least_responses: The number of scored responses that a prompt needs, for a loss that is not on pairs.
        normalizes: `prompt` if the loss does not change when the rewards of a prompt are shifted or scaled, `round` if
            it does not when those of the whole round are; None otherwise.
        round_values: Names of what `of_round` computes.
        metric_names: Names of the metrics that `metrics` returns, after `summarise`.
    """

    needs: ClassVar[Collection[str]] = frozenset({"rewards", "old_logps"})
    per: ClassVar[Element] = "group"
    on_pairs: ClassVar[bool] = False
    rewards_as_labels: ClassVar[bool] = False
    kl_per_token: ClassVar[bool] = False
    least_responses: ClassVar[int] = 2
    normalizes: ClassVar[Literal["prompt", "round"] | None] = None
    round_values: ClassVar[tuple[str, ...]] = ()
    metric_names: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def losses(self, groups: PromptGroups) -> Tensor:
        """Loss of every pair, group, response or token, as `per` says; shape (P,), (G,), (R,) or (M,)."""

    @property
    def terms(self) -> Sequence[tuple[float, "PolicyLoss"]]:
        """The losses whose weighted sum this is, with their weights; each is a mean over its own elements."""
        return [(1.0, self)]

    @property
    def meaning(self) -> str:
        """What the loss's number is, where a round starts it, and which way is good: a clause for a run's first lines.

        A class attribute or a property of yours takes its place.
        """
        return f"mean of {type(self).__name__} over the round's {self.per}s"

    @property
    def larger_steps(self) -> Mapping[str, str]:
        """Options of the loss that let a round move the policy further, and how: such as {"eta": "raise"}.

        A round that has hardly moved the policy names them where the loss's targets are the reason: those of
        `PairwiseLoss.targets`, or `reach`; and beside the learning rate where it has neither.
        """
        return {}

    @property
    def reach(self) -> float | None:
        """Log-ratio margin of a pair beyond which the loss hardly pushes, nats; None if there is no such limit."""
        return None

    @property
    def uses_pairs(self) -> bool:
        """Whether the policy trains on pairs. All terms then see the responses of the pairs alone."""
        return any(term.per == "pair" or term.on_pairs for _, term in self.terms)

    @property
    def needs_reward_values(self) -> bool:
        """Whether it reads the values of rewards, rather than none or only which responses are the better ones."""
        return any("rewards" in term.needs and not term.rewards_as_labels for _, term in self.terms)

    @property
    def needs_responses(self) -> int:
        """The number of scored responses that a prompt needs."""
        return 2 if self.uses_pairs else max(term.least_responses for _, term in self.terms)

    @property
    def uses_ties(self) -> bool:
        """Whether pairs with equal rewards are of use, as for a regression onto margins."""
        return any(getattr(term, "ties", False) for _, term in self.terms)

    def metrics(self, groups: PromptGroups) -> dict[str, Tensor]:
        """Further metrics, logged as means over all elements of an update: tensors of any shape, by name."""
        return {}

    def summarise(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics of an update from the means of `metrics` over it, by name: for variances and the like."""
        return dict(means)

    def of_round(self, read: Callable[[], Iterator[PromptGroups]]) -> dict[str, Tensor]:
        """Compute numbers of single responses or tokens that need a look at the whole round, before it trains.

        They must follow from the round alone: a run that resumes computes them again.

        Args:
            read: Iterates over all groups of the round, many at a time, for a policy that equals pi_old; may be called
                several times.

        Returns:
            What `round_values` names, each of shape (R,) or (M,) for all R responses or M tokens of the round in the
            order of `read`, float32. `losses` finds those of its batch in `PromptGroups.stored`.
        """
        return {}

    def counts(self, lengths: Tensor, finished: Tensor) -> Tensor:
        """Number of elements that each response has in the mean over an update, shape (R,); for `response` and `token`.

        Override it where some elements do not count, for example those of truncated responses, and leave these out of
        `losses`.

        Args:
            lengths: Tokens of each response, shape (R,), int64.
            finished: Whether each response ended with an EOS, shape (R,), bool.
        """
        return lengths if self.per == "token" else torch.ones_like(lengths)

    def counts_in(self, groups: PromptGroups) -> Tensor:
        """The same, where rewards or pairs decide; `groups` has no log-probs of tokens. Override one of the two."""
        return self.counts(groups.lengths, groups.finished)

    @property
    def leaves_out(self) -> bool:
        """Whether some elements may not count."""
        kind = type(self)
        return kind.counts is not PolicyLoss.counts or kind.counts_in is not PolicyLoss.counts_in

    @property
    def chooses(self) -> tuple[str, ...]:
        """Names of the numbers that `choose` sets for each round, logged as `train/<name>`; empty to choose nothing."""
        return ()

    def choose(self, facts: RoundFacts) -> Choice:
        """Choose numbers for a round, before its first update: a pure function of the round's facts.

        Returns:
            The numbers that `chooses` names, and what explains them, plain numbers and text: all is in the round's
            manifest. An entry `kept` says why nothing could be chosen; it is shown to the user.
        """
        return {}

    @property
    def choice(self) -> Mapping[str, float | str]:
        """What `choose` returned for the round in training; empty before the first one."""
        return getattr(self, "_choice", {})

    def use(self, choice: Mapping[str, float | str]) -> None:
        """Use a round's choice. It is no setting: `_choice` is in no description of the loss."""
        self._choice = dict(choice)


class PairwiseLoss(PolicyLoss):
    """A loss on (chosen, rejected) pairs. Subclass it and name your class in `model.loss.class_path`.

    The log-ratios are relative to pi_old, the policy that sampled the round. Where `needs` names `reference_logps` and
    not `old_logps`, they are relative to the fixed reference.

    Attributes:
        ties: Whether pairs with equal rewards are of use: for a regression onto margins, whose target is then 0.
    """

    per: ClassVar[Element] = "pair"
    ties: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, chosen_logratios: Tensor, rejected_logratios: Tensor, reward_margins: Tensor) -> Tensor:
        """Loss per pair, shape (B,), not reduced; the arguments are those of `rebel_loss`."""

    def losses(self, groups: PromptGroups) -> Tensor:
        base = groups.old_logps if "old_logps" in self.needs else groups.reference_logps
        chosen, rejected = groups.pair_logps - groups.pairs(base)
        return self(chosen, rejected, reward_margins(groups))

    def targets(self, reward_margins: Tensor) -> Tensor | None:
        """The log-ratio margins that are the loss's minimum, shape (B,), nats; None where it has no such targets."""
        return None


def reward_margins(groups: PromptGroups) -> Tensor:
    """Chosen minus rejected reward of each pair, shape (P,)."""
    chosen, rejected = groups.pairs(groups.rewards)
    return chosen - rejected


def check_needs(loss: PolicyLoss, kl_coef: float, extra_passes: Collection[str] = ()) -> frozenset[str]:
    """What a loss and the KL penalty in the reward need together; per-token log-probs come with their sums.

    Args:
        loss: Names its needs.
        kl_coef: Weight of the KL penalty, reward units per nat.
        extra_passes: What the module computes beside log-probs.

    Raises:
        InputError: The loss needs something unknown or has an unknown `per`, or it reads no rewards that a KL penalty
            could change.
    """
    if not isinstance(loss, PolicyLoss):
        raise InputError(f"`model.loss` must be a PolicyLoss, got {loss!r}. Leave it out for RebelLoss.")
    name, needs = type(loss).__name__, frozenset[str]()
    for _, term in loss.terms:
        needs |= _declared_needs(term, extra_passes)
    if Z_REF in needs:
        needs |= {"reference_logps"}
    if SAMPLING_LOGPS in needs:  # what a weight is of
        needs |= {"old_token_logps"}
    needs |= {summed for summed, per_token in zip(SUMMED, PER_TOKEN, strict=True) if per_token in needs}
    if (values := [v for _, term in loss.terms for v in term.round_values]) and len(set(values)) < len(values):
        raise InputError(f"`model.loss`: {name} has two losses that compute {', '.join(sorted(set(values)))}.")
    if kl_coef == 0:
        return needs
    if "rewards" not in needs:
        raise InputError(
            f"`model.kl_coef` is {kl_coef}, but `model.loss` {name} reads no rewards, and the KL penalty is part of "
            "them. It would have no effect: set it to 0."
        )
    per_token = PER_TOKEN if any(term.kl_per_token for _, term in loss.terms) else ()
    return needs | {*SUMMED, *per_token}


def _declared_needs(loss: PolicyLoss, extra_passes: Collection[str]) -> frozenset[str]:
    """The needs of one term, if what it declares is known."""
    name = type(loss).__name__
    if loss.per not in get_args(Element):
        raise InputError(f"`model.loss`: {name}.per is {loss.per!r}. Available: {', '.join(get_args(Element))}.")
    if isinstance(loss.needs, str):
        raise InputError(f"`model.loss`: {name}.needs is a string. Write a set: needs = {{{loss.needs!r}}}.")
    needs, known = frozenset(loss.needs), (*NEEDS, *extra_passes)
    if unknown := sorted(needs - set(known)):
        hint = " Values come from a critic: set --model rlhf_pl.PPOModule." if OLD_VALUES in unknown else ""
        raise InputError(f"`model.loss`: {name} needs {', '.join(unknown)}. Available: {', '.join(known)}.{hint}")
    return needs


def element_losses(loss: PolicyLoss, groups: PromptGroups) -> Tensor:
    """The values of `loss.losses`, one per element; for pairs their mean over each prompt, shape (G,).

    Args:
        loss: A loss that is no sum of several.
        groups: Its input.

    Raises:
        InputError: They do not have the shape that `per` says.
    """
    losses, responses, name = loss.losses(groups), len(groups.lengths), type(loss).__name__
    elements = {
        "pair": responses // 2 if groups.pair_rows is None else groups.pair_rows.shape[1],
        "group": len(groups.sizes),
        "response": responses,
        "token": len(groups.token_logps),
    }[loss.per]
    leaves_out = loss.per in ("response", "token") and loss.leaves_out
    if losses.dim() != 1 or (len(losses) > elements if leaves_out else len(losses) != elements):
        raise InputError(
            f"`model.loss`: {name} returned values of shape {tuple(losses.shape)}, but its `per` is {loss.per!r}: "
            f"return one value per {loss.per}, not reduced, here shape ({elements},)."
        )
    return groups.mean_per_prompt(losses) if loss.per == "pair" else losses


def logged_names(loss: PolicyLoss, needs: Collection[str]) -> tuple[str, ...]:
    """Names of the metrics logged with every update: those of `logged`, with means and variances of ratios."""
    pairs, old = loss.uses_pairs, "old_logps" in needs
    names: tuple[str, ...] = ("loss",)
    if old:
        names += ("kl", *(("kl_chosen", "kl_rejected") if pairs else ()), "ratio_mean", "ratio_var")
    if pairs and (old or "reference_logps" in needs):
        names += ("logratio_margin", "reward_margin", "sign_align")
    return (*names, *((Z_REF,) if Z_REF in needs else ()), *loss.metric_names)


@torch.no_grad()
def logged(loss: PolicyLoss, groups: PromptGroups) -> dict[str, Tensor]:
    """Metrics logged beside the loss, as far as the log-probs of other policies are available: tensors by name.

    `ratio` and `ratio_square` are of pi_theta / pi_old - 1, which is near 0, so that float32 keeps variances as small
    as rounding errors.
    """
    stored, pairs = groups.stored, loss.uses_pairs
    parts: dict[str, Tensor] = {}
    if "old_logps" in stored:
        logratios = groups.logps - groups.old_logps
        parts = _pair_metrics(groups, logratios) if pairs else _response_metrics(logratios)
    if pairs and any(name in stored for name in SUMMED):
        base = stored["old_logps" if "old_logps" in stored else "reference_logps"]
        parts |= _margin_metrics(groups, groups.logps - base)
    if Z_REF in stored:
        parts[Z_REF] = stored[Z_REF]
    return {**parts, **loss.metrics(groups)}


def _response_metrics(logratios: Tensor) -> dict[str, Tensor]:
    ratios = logratios.expm1()
    return {"kl": -logratios, "ratio": ratios, "ratio_square": ratios.square()}


def _pair_metrics(groups: PromptGroups, logratios: Tensor) -> dict[str, Tensor]:
    """Metrics of the responses of pairs, a value per prompt."""
    ratios = logratios.expm1()
    chosen, rejected = groups.pairs(logratios)
    return {
        "kl": -groups.sum_per_group(logratios) / groups.sizes,
        "kl_chosen": groups.mean_per_prompt(-chosen),
        "kl_rejected": groups.mean_per_prompt(-rejected),
        "ratio": groups.sum_per_group(ratios) / groups.sizes,
        "ratio_square": groups.sum_per_group(ratios.square()) / groups.sizes,
    }


def _margin_metrics(groups: PromptGroups, logratios: Tensor) -> dict[str, Tensor]:
    chosen, rejected = groups.pairs(logratios)
    rewards = reward_margins(groups)
    return {
        "logratio_margin": groups.mean_per_prompt(chosen - rejected),
        "reward_margin": groups.mean_per_prompt(rewards),
        "sign_align": groups.mean_per_prompt(((chosen - rejected).sign() == rewards.sign()).float()),
    }
