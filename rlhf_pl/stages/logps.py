"""Log-probs of a round's pairs under the policies that do not train."""

import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rlhf_pl.ranks import Ranks
from rlhf_pl.rounds import Round
from rlhf_pl.rows import RowBatch, Tree, batches_by_length, lay_out
from rlhf_pl.stages.generate import Report

LogpsFunction = Callable[[RowBatch, float], Tensor]


def pair_logps(
    stored: Round,
    policies: dict[str, LogpsFunction],
    tokens_per_batch: int,
    temperature: float,
    report: Report = lambda count, note: None,
    ranks: Ranks = Ranks(),  # noqa: B008 - one process
) -> None:
    """Summed log-probs of every pair's two answers under each of `policies` (`old`, and perhaps `reference`).

    Args:
        stored: The round; its pairs are read, its `logps` written.
        policies: (rows, temperature) -> log-probs of the M wanted tokens, shape (M,), by name.
        tokens_per_batch: Tokens per batch.
        temperature: The temperature the answers were drawn at.
        report: Gets (answers done, note).
        ranks: The batches are dealt out to them. Sharded policies need all ranks at every call, so a rank that has one
            batch fewer goes through one for nothing.
    """
    started = time.monotonic()
    pairs = stored.read("pairs").select(["prompt_id", "prompt_tokens", "chosen_tokens", "rejected_tokens"]).to_pylist()
    columns: dict[str, Any] = {"prompt_id": pa.array([p["prompt_id"] for p in pairs], pa.string())}
    trees = [Tree(p["prompt_tokens"], (p["chosen_tokens"], p["rejected_tokens"])) for p in pairs]
    for name, policy in policies.items():
        logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
        batches = list(batches_by_length(trees, tokens_per_batch))
        for start in range(0, len(batches), ranks.size):
            counts = start + ranks.rank < len(batches)
            batch = batches[start + ranks.rank if counts else -1]
            rows = lay_out([trees[i] for i in batch])
            found = rows.totals(policy(rows, temperature).cpu()).double()
            if counts:
                logps[batch] = found.view(-1, 2)
            report(2 * sum(map(len, batches[start : start + ranks.size])), "")
        chosen, rejected = ranks.total(logps).T.numpy()
        columns |= {f"chosen_{name}_logp": chosen, f"rejected_{name}_logp": rejected}

    def write() -> None:
        stored.write_shard("logps", 0, pa.table(columns))
        stored.complete("logps", seconds=time.monotonic() - started, policies=list(policies))

    ranks.first(write)
