"""The pass without gradient before an update's first micro-batch, and the values that it keeps for the update."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_pl.algorithms.prompt_groups import Z_REF
from rlhf_pl.data.ahead import Ahead
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch

LogpsOfRows = Callable[[PackedBatch], Tensor]  # log-probs of the M targets of a batch, shape (M,)


class AheadPass:
    """Values of the policy as it is before an update, which are constants in that update. They are never saved.

    Attributes:
        token_logps: Log-probs of all response tokens of each group that is split, by the group's index, nats.
        numbers: Numbers of shape () that the whole update has in common: `Z_REF`, if it is computed.
    """

    def __init__(self) -> None:
        self.token_logps: dict[int, Tensor] = {}
        self.numbers: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget the values: the update is over."""
        self.token_logps, self.numbers = {}, {}

    @torch.no_grad()
    def compute(self, ahead: Ahead, logps: LogpsOfRows, ranks: Ranks, device: torch.device) -> None:
        """Compute the values of an update; all ranks call it together.

        Each rank computes its own micro-batches, exactly as they train, so that the log-probs are identical to those of
        the training; the ranks then exchange the parts.

        Args:
            ahead: The batches of this rank.
            logps: The policy.
            ranks: The run's ranks.
            device: Device of this rank.
        """
        own: dict[tuple[int, int], Tensor] = {}
        for rows, parts in ahead.parts:
            own |= parts.by_part(logps(rows))
        total, count = 0.0, 0
        for batch in ahead.mismatched:
            logratios = batch.rows.sum_per_response(logps(batch.rows)) - batch.reference_logps
            if batch.counts:
                total, count = total + logratios.cpu().double().sum().item(), count + len(logratios)
        if torch.is_autocast_enabled(device.type):
            torch.clear_autocast_cache()  # casts made without gradient would cut the gradient of the training's pass
        self.token_logps = _join(_exchange(own, ranks, device))
        if ahead.mismatched:
            totals, counts = zip(*ranks.all_gather((total, count)), strict=True)
            self.numbers = {Z_REF: torch.tensor(max(0.0, sum(totals) / max(1, sum(counts))), device=device)}


def _exchange(own: dict[tuple[int, int], Tensor], ranks: Ranks, device: torch.device) -> dict[tuple[int, int], Tensor]:
    """The parts of all ranks."""
    if ranks.size == 1:
        return own
    gathered = ranks.all_gather({key: values.cpu() for key, values in own.items()})
    return {key: values.to(device) for of_rank in gathered for key, values in of_rank.items()}


def _join(parts: dict[tuple[int, int], Tensor]) -> dict[int, Tensor]:
    """Join the parts of each group in the order of its responses."""
    joined: dict[int, list[Tensor]] = {}
    for group, before in sorted(parts):
        joined.setdefault(group, []).append(parts[group, before])
    return {group: torch.cat(of_group) for group, of_group in joined.items()}
