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

_WHICH = ("chosen", "rejected")
LogpsFunction = Callable[[RowBatch, float], Tensor]


def pair_logps(
    stored: Round,
    policies: dict[str, LogpsFunction],
    tokens_per_batch: int,
    temperature: float,
    report: Report = lambda count, note: None,
    ranks: Ranks = Ranks(),  # noqa: B008 - one process
    check_sampler_with: LogpsFunction | None = None,
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
        check_sampler_with: The policy, where `old` is to be what the sampler noted; how far the two are apart is
            measured on one batch.
    """
    started = time.monotonic()
    wanted = ["prompt_id", "prompt_tokens", *(f"{w}_{what}" for w in _WHICH for what in ("tokens", "index"))]
    table = stored.read("pairs")
    pairs = table.select([name for name in wanted if name in table.column_names]).to_pylist()
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

    difference = {}
    if check_sampler_with is not None:
        noted = _noted_by_sampler(stored, pairs)
        columns |= {f"{which}_old_logp": noted[:, i].numpy() for i, which in enumerate(_WHICH)}
        batch = next(batches_by_length(trees, tokens_per_batch), [])
        if batch:
            rows = lay_out([trees[i] for i in batch])
            own = rows.totals(check_sampler_with(rows, temperature).cpu()).double().view(-1, 2)
            apart = (own - noted[batch]).abs().sum().item()
            difference = {"sampler_difference": apart / len(rows.targets)}

    def write() -> None:
        stored.write_shard("logps", 0, pa.table(columns))
        names = [*(["sampler"] if difference else []), *policies]
        stored.complete("logps", seconds=time.monotonic() - started, policies=names, **difference)

    ranks.first(write)


def _noted_by_sampler(stored: Round, pairs: list[dict[str, Any]]) -> Tensor:
    """What the sampler noted while it drew the pairs' answers, shape (pairs, 2), float64."""
    drawn = stored.read("responses").select(["prompt_id", "response_index", "sampler_logp"]).to_pydict()
    found = dict(zip(zip(drawn["prompt_id"], drawn["response_index"], strict=True), drawn["sampler_logp"], strict=True))
    rows = [[found[pair["prompt_id"], pair[f"{which}_index"]] for which in _WHICH] for pair in pairs]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2)
