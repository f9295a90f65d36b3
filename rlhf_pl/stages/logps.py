"""Log-probs of a round's pairs under the policies that do not train."""

import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rlhf_pl.rounds import Round
from rlhf_pl.rows import Row, RowBatch, batches_by_length, pad_rows
from rlhf_pl.stages.generate import Report

LogpsFunction = Callable[[RowBatch, float], Tensor]


def pair_logps(
    stored: Round,
    policies: dict[str, LogpsFunction],
    tokens_per_batch: int,
    temperature: float,
    report: Report = lambda count, note: None,
) -> None:
    """Summed log-probs of every pair's two answers under each of `policies` (`old`, and perhaps `reference`).

    Args:
        stored: The round; its pairs are read, its `logps` written.
        policies: (rows, temperature) -> token log-probs, shape (R, T), by name.
        tokens_per_batch: Padded tokens per batch.
        temperature: The temperature the answers were drawn at.
        report: Gets (answers done, note).
    """
    started = time.monotonic()
    pairs = stored.read("pairs").select(["prompt_id", "prompt_tokens", "chosen_tokens", "rejected_tokens"]).to_pylist()
    columns: dict[str, Any] = {"prompt_id": pa.array([p["prompt_id"] for p in pairs], pa.string())}
    rows = [Row(p["prompt_tokens"], p[f"{which}_tokens"]) for which in ("chosen", "rejected") for p in pairs]
    for name, policy in policies.items():
        logps = torch.zeros(len(rows), dtype=torch.float64)
        for batch in batches_by_length(rows, tokens_per_batch):
            logps[batch] = policy(pad_rows([rows[i] for i in batch]), temperature).sum(-1).double().cpu()
            report(len(batch), "")
        chosen, rejected = logps.view(2, len(pairs)).numpy()
        columns |= {f"chosen_{name}_logp": chosen, f"rejected_{name}_logp": rejected}
    stored.write_shard("logps", 0, pa.table(columns))
    stored.complete("logps", seconds=time.monotonic() - started, policies=list(policies))
