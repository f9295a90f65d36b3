"""Collects the margins of pairs over an update, its micro-batches and ranks, and over the round."""

from typing import Any

import torch
from torch import Tensor

from rlhf_pl.algorithms.margin_metrics import COLUMNS, margin_metrics, summarise_margins
from rlhf_pl.distributed.ranks import Ranks


class PairMargins:
    """Numbers of pairs. They stay on the device until an update is complete, so that no micro-batch waits for them."""

    def __init__(self) -> None:
        self._update: list[Tensor] = []
        self._round: list[Tensor] = []

    def add(self, columns: Tensor) -> None:
        """Add the pairs of a micro-batch, from `pair_columns`."""
        self._update.append(columns)

    def compute_and_reset(self, prefix: str, ranks: Ranks) -> dict[str, float]:
        """Metrics as `prefix/name` over all pairs since the last call; they become part of the round.

        All ranks must call it together.
        """
        own = torch.cat(self._update, 1).cpu() if self._update else torch.zeros(len(COLUMNS), 0)
        self._update = []
        pairs = torch.cat(ranks.all_gather(own), 1)
        self._round.append(pairs)
        return {f"{prefix}/{name}": value for name, value in margin_metrics(pairs.double()).items()}

    def of_round(self) -> Tensor:
        """All pairs since `start_round`, shape (5, P), float32."""
        self._round = [torch.cat(self._round, 1) if self._round else torch.zeros(len(COLUMNS), 0)]
        return self._round[0]

    def summary(self) -> dict[str, Any]:
        """Metrics of the round for its manifest; empty without pairs."""
        pairs = self.of_round()
        return summarise_margins(pairs.double()) if pairs.shape[1] else {}

    def histograms(self, prefix: str) -> dict[str, Tensor]:
        """The round's log-ratio margins and targets by name, finite ones alone, each of shape (P,)."""
        logratios, _, targets, _, _ = self.of_round()
        found = {"reached": logratios, "target": targets}
        return {f"{prefix}/{k}_histogram": v[v.isfinite()] for k, v in found.items() if v.isfinite().any()}

    def start_round(self, pairs: Tensor | None = None) -> None:
        """Begin a round, with the pairs that it had at a checkpoint."""
        self._update, self._round = [], [] if pairs is None else [pairs]
