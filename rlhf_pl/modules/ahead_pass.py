"""The pass without gradient before an update's first micro-batch, and the values that it keeps for the update."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import Z_REF
from rlhf_pl.data.ahead import Ahead
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch

# log-probs of the M targets of a batch, shape (M,), and further numbers of each target by name
NumbersOfRows = Callable[[PackedBatch], tuple[Tensor, Mapping[str, Tensor]]]
Parts = dict[tuple[int, int], Tensor]  # by group and number of its response tokens before
_LOGPS = "logps"


class AheadPass:
    """Values of the policy as it is before an update, which are constants in that update. They are never saved.

    Attributes:
        token_logps: Log-probs of all response tokens of each group that is split, by the group's index, nats.
        further: Other numbers of the same tokens, such as a critic's values, by name.
        numbers: Numbers of shape () that the whole update has in common: `Z_REF`, if it is computed.
    """

    def __init__(self) -> None:
        self.token_logps: dict[int, Tensor] = {}
        self.further: dict[str, dict[int, Tensor]] = {}
        self.numbers: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget the values: the update is over."""
        self.token_logps, self.further, self.numbers = {}, {}, {}

    @torch.no_grad()
    def compute(self, ahead: Ahead, numbers: NumbersOfRows, ranks: Ranks, device: torch.device) -> None:
        """Compute the values of an update; all ranks call it together.

        Each rank computes its own micro-batches, exactly as they train, so that the numbers are identical to those of
        the training; the ranks then exchange the parts.

        Args:
            ahead: The batches of this rank.
            numbers: The policy, and what else the module computes of tokens.
            ranks: The run's ranks.
            device: Device of this rank.
        """
        own: dict[str, Parts] = {}
        for rows, parts in ahead.parts:
            logps, further = numbers(rows)
            for name, values in {_LOGPS: logps, **further}.items():
                own.setdefault(name, {}).update(parts.by_part(values))
        total, count = 0.0, 0
        for batch in ahead.mismatched:
            logratios = batch.rows.sum_per_response(numbers(batch.rows)[0]) - batch.reference_logps
            if batch.counts:
                total, count = total + logratios.cpu().double().sum().item(), count + len(logratios)
        if torch.is_autocast_enabled(device.type):
            torch.clear_autocast_cache()  # casts made without gradient would cut the gradient of the training's pass
        self.further = {name: _join(parts) for name, parts in _exchange(own, ranks, device).items()}
        self.token_logps = self.further.pop(_LOGPS, {})
        if ahead.mismatched:
            totals, counts = zip(*ranks.all_gather((total, count)), strict=True)
            self.numbers = {Z_REF: torch.tensor(max(0.0, sum(totals) / max(1, sum(counts))), device=device)}


def _exchange(own: dict[str, Parts], ranks: Ranks, device: torch.device) -> dict[str, Parts]:
    """The parts of all ranks."""
    if ranks.size == 1:
        return own
    found: dict[str, Parts] = {}
    for of_rank in ranks.all_gather({n: {key: v.cpu() for key, v in parts.items()} for n, parts in own.items()}):
        for name, parts in of_rank.items():
            found.setdefault(name, {}).update({key: values.to(device) for key, values in parts.items()})
    return found


def _join(parts: Parts) -> dict[int, Tensor]:
    """Join the parts of each group in the order of its responses."""
    joined: dict[int, list[Tensor]] = {}
    for group, before in sorted(parts):
        joined.setdefault(group, []).append(parts[group, before])
    return {group: torch.cat(of_group) for group, of_group in joined.items()}
