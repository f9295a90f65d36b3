"""What is computed without gradient before an update's first micro-batch trains."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pl.data.group_parts import BatchParts
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.models.packed_layout import to_device


@dataclass(frozen=True)
class Mismatched:
    """Responses under the prompts of other groups.

    Args:
        rows: Their tokens, R responses.
        reference_logps: Their log-probs under the reference, shape (R,), float32, nats.
        counts: Whether they count; otherwise they only keep the ranks in step.
    """

    rows: PackedBatch
    reference_logps: Tensor
    counts: bool

    def to(self, device: torch.device | str) -> "Mismatched":
        """The same on `device`."""
        return Mismatched(self.rows.to(device), to_device(self.reference_logps, device), self.counts)


@dataclass(frozen=True)
class Ahead:
    """The batches of one rank; every rank has equally many.

    Args:
        parts: The micro-batches of the update that have parts of groups that are split, exactly as they train.
        mismatched: The responses of the update under other prompts, if the loss needs their log-ratios.
    """

    parts: tuple[tuple[PackedBatch, BatchParts], ...] = ()
    mismatched: tuple[Mismatched, ...] = ()

    def to(self, device: torch.device | str) -> "Ahead":
        """The same on `device`."""
        parts = tuple((rows.to(device), parts.to(device)) for rows, parts in self.parts)
        return Ahead(parts, tuple(batch.to(device) for batch in self.mismatched))
