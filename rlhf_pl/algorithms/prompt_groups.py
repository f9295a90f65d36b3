"""A batch as losses see it: prompt groups with their numbers, and sums and means over them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from rlhf_pl.utils.errors import InputError

Element = Literal["pair", "group", "response", "token"]
SUMMED = ("old_logps", "reference_logps")  # of each response
PER_TOKEN = ("old_token_logps", "reference_token_logps")
VALUES, OLD_VALUES = "values", "old_values"  # of a critic, before each token: now, and before the round trains
SAMPLING_LOGPS = "sampling_token_logps"  # of the policy that sampled the responses, where that may not be pi_old
# KTO's estimate of KL(pi_theta || pi_ref): the mean log-ratio of an update's responses to other prompts, at least 0
Z_REF = "kto_z_ref"
NEEDS = ("rewards", *SUMMED, *PER_TOKEN, SAMPLING_LOGPS, Z_REF)


def extra_needs(needs: Collection[str]) -> list[str]:
    """Those needs that a method of the module computes: its `extra_passes`."""
    return sorted(set(needs) - set(NEEDS))


@dataclass(frozen=True)
class PromptGroups:
    """G prompts with the R responses to train on, group by group, and their M tokens, response by response.

    In a batch of pairs a group has the responses that the pairs of its prompt use, each of them once.

    Args:
        token_logps: log pi_theta of every response token, shape (M,), float32, nats, with gradient.
        logps: Sums of `token_logps` over each response, shape (R,), float32, nats, with gradient.
        rewards: Shaped rewards, with the KL penalty of `model.kl_coef`, shape (R,), float32, reward units.
        lengths: Tokens of each response, shape (R,), int64.
        finished: Whether each response ended with an EOS, shape (R,), bool; the others are truncated.
        sizes: Responses of each group, shape (G,), int64.
        stored: Log-probs under the policies that do not train, by their names in `NEEDS`, and the values of the
            module's `extra_passes`, shape (M,), as far as the loss needs them; `Z_REF` has shape (). What the loss has
            computed of the whole round, shape (R,) or (M,), is here too.
        pair_rows: Indices among the R responses of the chosen and the rejected response of each of P pairs, group after
            group, shape (2, P), int64. None if each group is one pair, (chosen, rejected), or there are no pairs.
        pair_sizes: Number of pairs of each group, shape (G,), int64; None together with `pair_rows`.
        kl_coef: Weight of the KL penalty in `rewards`, reward units per nat.
    """

    token_logps: Tensor
    logps: Tensor
    rewards: Tensor
    lengths: Tensor
    finished: Tensor
    sizes: Tensor
    stored: Mapping[str, Tensor]
    pair_rows: Tensor | None = None
    pair_sizes: Tensor | None = None
    kl_coef: float = 0.0

    @property
    def old_logps(self) -> Tensor:
        """Log pi_old (of the policy that sampled the round), summed over each response, shape (R,), nats."""
        return self._stored("old_logps")

    @property
    def reference_logps(self) -> Tensor:
        """The same under the fixed reference, shape (R,), nats."""
        return self._stored("reference_logps")

    @property
    def old_token_logps(self) -> Tensor:
        """Log pi_old of every token, shape (M,), nats."""
        return self._stored("old_token_logps")

    @property
    def reference_token_logps(self) -> Tensor:
        """The same under the fixed reference, shape (M,), nats."""
        return self._stored("reference_token_logps")

    def _stored(self, name: str) -> Tensor:
        if name not in self.stored:
            raise InputError(f"`model.loss` reads `{name}`, which its `needs` does not name. Add it there.")
        return self.stored[name]

    def token_rewards(self) -> Tensor:
        """The rewards of single tokens, shape (M,), which add up to `rewards`.

        Each token has its own KL penalty, -kl_coef * (log pi_old - log pi_ref), and the last one the score as well.
        """
        last = self.lengths.cumsum(0) - 1
        if self.kl_coef == 0:
            return torch.zeros_like(self.token_logps).index_put((last,), self.rewards)
        penalties = self.kl_coef * (self.old_token_logps - self.reference_token_logps)
        scores = self.rewards + self.kl_coef * (self.old_logps - self.reference_logps)
        return (-penalties).index_add(0, last, scores)

    def pairs(self, values: Tensor) -> Tensor:
        """Values of the chosen and of the rejected response of each pair: (R,) to (2, P)."""
        self._check_pairs()
        return values.view(-1, 2).T if self.pair_rows is None else values[self.pair_rows]

    def mean_per_prompt(self, values: Tensor) -> Tensor:
        """Mean over the pairs of each prompt, which counts once whatever its number of pairs: (P,) to (G,)."""
        return values if self.pair_sizes is None else segment_sums(values, self.pair_sizes) / self.pair_sizes

    @property
    def is_chosen(self) -> Tensor:
        """Whether a pair has the response as its chosen one, shape (R,), bool."""
        self._check_pairs()
        chosen = torch.zeros(len(self.lengths), dtype=torch.bool, device=self.lengths.device)
        chosen[slice(None, None, 2) if self.pair_rows is None else self.pair_rows[0]] = True
        return chosen

    def _check_pairs(self) -> None:
        if self.pair_rows is None and len(self.lengths) != 2 * len(self.sizes):
            raise InputError(
                "`model.loss` reads pairs, but it is on all responses of a prompt. Set `on_pairs = True` on its class, "
                'or `per = "pair"`.'
            )

    @cached_property
    def pair_logps(self) -> Tensor:
        """The pairs' `logps`, shape (2, P), nats: one tensor, so that the gradient of each pair can be asked for."""
        return self.pairs(self.logps)

    def sum_per_response(self, values: Tensor) -> Tensor:
        """Sums over the tokens of each response: (M,) to (R,)."""
        return segment_sums(values, self.lengths)

    def sum_per_group(self, values: Tensor) -> Tensor:
        """Sums over the responses of each group: (R,) to (G,)."""
        return segment_sums(values, self.sizes)

    def group_means(self, values: Tensor) -> Tensor:
        """Mean over each response's group: (R,) to (R,)."""
        return self.per_response(self.sum_per_group(values) / self.sizes)

    def per_response(self, values: Tensor) -> Tensor:
        """Value of each response's group: (G,) to (R,)."""
        return spread(values, self.sizes, len(self.lengths))

    def per_token(self, values: Tensor) -> Tensor:
        """Value of each token's response: (R,) to (M,)."""
        return spread(values, self.lengths, len(self.token_logps))


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums over consecutive segments.

    Args:
        values: Shape (N,).
        lengths: Length of each segment, on the device of `values`, shape (segments,), int64; they add up to N.

    Returns:
        Shape (segments,).
    """
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True, initial=0)


def spread(values: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Repeat the value of each segment for its elements: the sum of `lengths` is given, so the host waits for no GPU.

    Args:
        values: Shape (segments,).
        lengths: Length of each segment, on the device of `values`, shape (segments,), int64.
        total: Sum of `lengths`.

    Returns:
        Shape (total,).
    """
    return torch.repeat_interleave(values, lengths, output_size=total)


def apply_kl_penalty(rewards: Tensor, kl_coef: float, stored: Mapping[str, Tensor]) -> Tensor:
    """Rewards minus `kl_coef` times log pi_old - log pi_ref, shape (R,), reward units."""
    if kl_coef == 0:
        return rewards
    return rewards - kl_coef * (stored["old_logps"] - stored["reference_logps"])
