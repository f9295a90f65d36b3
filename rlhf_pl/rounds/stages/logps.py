"""Log-probs of a round's pairs under the policies that do not train."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, batches_by_length, pack
from rlhf_pl.rounds.stages.generate import Report
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError

_WHICH = ("chosen", "rejected")
LogpsFunction = Callable[[PackedBatch, float], Tensor]
Steps = list[list[list[int]]]  # pairs of each micro-batch, of each rank


def steps_by_length(tokens_per_batch: int, ranks: Ranks) -> Callable[[Sequence[int]], Steps]:
    """Pairs of like length together, within a budget of tokens, dealt out to ranks."""

    def divide(lengths: Sequence[int]) -> Steps:
        batches = list(batches_by_length([range(n) for n in lengths], tokens_per_batch))
        parts = (batches[start : start + ranks.size] for start in range(0, len(batches), ranks.size))
        return [part + [[]] * (ranks.size - len(part)) for part in parts]

    return divide


def pair_logps(
    stored: Round,
    policies: dict[str, LogpsFunction],
    divide: Callable[[Sequence[int]], Steps],
    temperature: float,
    report: Report = lambda count, note: None,
    ranks: Ranks = Ranks(),  # noqa: B008 - one process
    check_sampler_with: LogpsFunction | None = None,
) -> None:
    """Summed log-probs of every pair's two answers under each of `policies` (`old`, and perhaps `reference`).

    Args:
        stored: The round; its pairs are read, its `logps` written.
        policies: (rows, temperature) -> log-probs of the M wanted tokens, shape (M,), by name.
        divide: Lengths of pairs -> which of them are computed together. Of a round that trains these are the training's
            own micro-batches: the last digits depend on what is computed together, and so a policy that has not
            changed gives the very same numbers there. A pair that comes again is passed over.
        temperature: The temperature the answers were drawn at.
        report: Gets (answers done, note).
        ranks: Sharded policies need all of them at every call: one that has no pairs goes through one for nothing.
        check_sampler_with: The policy, where `old` is to be what the sampler noted; how far the two are apart is
            measured on one batch.
    """
    started = time.monotonic()
    wanted = ["prompt_id", "prompt_tokens", *(f"{w}_{what}" for w in _WHICH for what in ("tokens", "index"))]
    table = stored.read("pairs")
    pairs = table.select([name for name in wanted if name in table.column_names]).to_pylist()
    columns: dict[str, Any] = {"prompt_id": pa.array([p["prompt_id"] for p in pairs], pa.string())}
    trees = [PrefixGroup(p["prompt_tokens"], (p["chosen_tokens"], p["rejected_tokens"])) for p in pairs]
    steps = divide(list(map(len, trees))) if pairs else []
    for name, policy in policies.items():
        logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
        left = set(range(len(pairs)))
        for step in steps:
            fresh = [[i for i in part if i in left] for part in step]
            if not any(fresh):
                continue
            left.difference_update(*fresh)
            batch, mine = step[ranks.rank] or [0], fresh[ranks.rank]
            rows = pack([trees[i] for i in batch])
            found = rows.sum_per_response(policy(rows, temperature)).cpu().double().view(-1, 2)
            if mine:
                logps[mine] = found[[batch.index(i) for i in mine]]
            report(2 * sum(map(len, fresh)), "")
        chosen, rejected = ranks.all_reduce_sum(logps).T.numpy()
        columns |= {f"chosen_{name}_logp": chosen, f"rejected_{name}_logp": rejected}

    difference = {}
    if check_sampler_with is not None:
        noted = _noted_by_sampler(stored, pairs)
        columns |= {f"{which}_old_logp": noted[:, i].numpy() for i, which in enumerate(_WHICH)}
        batch = next((step[0] for step in steps if step[0]), [])
        if batch:
            rows = pack([trees[i] for i in batch])
            own = rows.sum_per_response(check_sampler_with(rows, temperature)).cpu().double().view(-1, 2)
            apart = (own - noted[batch]).abs().sum().item()
            difference = {"sampler_difference": apart / len(rows.targets)}

    def write() -> None:
        stored.write_shard("logps", 0, pa.table(columns))
        names = [*(["sampler"] if difference else []), *policies]
        stored.complete("logps", seconds=time.monotonic() - started, policies=names, **difference)

    ranks.run_on_rank_zero(write)


def _noted_by_sampler(stored: Round, pairs: list[dict[str, Any]]) -> Tensor:
    """What the sampler noted while it drew the pairs' answers, shape (pairs, 2), float64."""
    drawn = stored.read("responses").select(["prompt_id", "response_index", "sampler_logp"]).to_pydict()
    if None in drawn["sampler_logp"]:
        raise InputError(
            f"`rollout.old_logps` is sampler, but the answers of {stored.path} were drawn without noting log-probs. "
            "Set it to policy for this round, or move the round's folder away to draw its answers again."
        )
    found = dict(zip(zip(drawn["prompt_id"], drawn["response_index"], strict=True), drawn["sampler_logp"], strict=True))
    rows = [[found[pair["prompt_id"], pair[f"{which}_index"]] for which in _WHICH] for pair in pairs]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2)
