"""Log-probs of the responses that a round trains on, under the policies that do not train."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from rlhf_pl.data.stored_groups import KEY, StoredGroups, stored_groups
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch, batches_by_length, pack
from rlhf_pl.rounds.stages.generate import Report
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError

LogpsFunction = Callable[[PackedBatch, float], Tensor]
_SHARD_ROWS = 1 << 15  # of all, one file with every token's log-prob would be in memory twice
Steps = list[list[list[int]]]  # groups of each micro-batch, of each rank


def steps_by_length(tokens_per_batch: int, ranks: Ranks) -> Callable[[Sequence[int]], Steps]:
    """Groups of like length together, within a budget of tokens, dealt out to ranks."""

    def divide(lengths: Sequence[int]) -> Steps:
        batches = list(batches_by_length([range(n) for n in lengths], tokens_per_batch))
        parts = (batches[start : start + ranks.size] for start in range(0, len(batches), ranks.size))
        return [part + [[]] * (ranks.size - len(part)) for part in parts]

    return divide


def store_logps(
    stored: Round,
    policies: Mapping[str, LogpsFunction],
    divide: Callable[[Sequence[int]], Steps],
    temperature: float,
    report: Report = lambda count, note: None,
    ranks: Ranks = Ranks(),  # noqa: B008 - one process
    needs: Collection[str] = (),
    given: Mapping[str, np.ndarray] | None = None,
    check_sampler_with: LogpsFunction | None = None,
) -> None:
    """Log-probs of each response that is used, under each of `policies` (`old`, `reference`).

    Args:
        stored: The round; its groups are read, its `logps` written: a row per response.
        policies: (rows, temperature) -> log-probs of the M wanted tokens, shape (M,), by name.
        divide: Lengths of groups -> which of them are computed together. Of a round that trains these are the
            training's own micro-batches: the last digits depend on what is computed together, and so a policy that has
            not changed gives the very same numbers there. A response that comes again is passed over.
        temperature: The temperature the responses were sampled at.
        report: Gets (responses done, note).
        ranks: Sharded policies need all of them at every call: one without a group repeats another's and discards the
            result.
        needs: What is stored for each token too, such as `old_token_logps`; the sums always are.
        given: Sums that are known, shape (R,), by the name of their policy.
        check_sampler_with: The policy, where `old` is to be what the sampler reported; how far the two are apart is
            measured on one batch.
    """
    started = time.monotonic()
    groups = stored_groups(stored)
    steps = _Steps(groups, divide(groups.lengths()) if len(groups) else [], temperature, ranks)
    columns: dict[str, Any] = {KEY[0]: groups.prompt_ids, KEY[1]: groups.indices}
    for name, policy in policies.items():
        per_token = f"{name}_token_logps"
        columns |= steps.logps(policy, f"{name}_logp", per_token if per_token in needs else None, report)
    columns |= {f"{name}_logp": values for name, values in (given or {}).items()}
    difference = {}
    if check_sampler_with is not None:
        columns["old_logp"] = _reported_by_sampler(stored, groups)
        if (apart := steps.apart(check_sampler_with, columns["old_logp"])) is not None:
            difference = {"sampler_difference": apart}

    def write() -> None:
        table = pa.table(columns)
        for number, start in enumerate(range(0, max(1, len(table)), _SHARD_ROWS)):
            stored.write_shard("logps", number, table.slice(start, _SHARD_ROWS))
        names = [*(["given"] if given else []), *(["sampler"] if difference else []), *policies]
        stored.complete("logps", seconds=time.monotonic() - started, policies=names, **difference)

    ranks.run_on_rank_zero(write)


class _Steps:
    """The forward passes over a round's groups, divided among ranks."""

    def __init__(self, groups: StoredGroups, steps: Steps, temperature: float, ranks: Ranks) -> None:
        self.groups, self.steps, self.temperature, self.ranks = groups, steps, temperature, ranks

    def logps(self, policy: LogpsFunction, name: str, per_token: str | None, report: Report) -> dict[str, Any]:
        """The columns `name` and, where wanted, `per_token`; all ranks call it."""
        lengths = self.groups.response_lengths()
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        logps = torch.zeros(len(lengths), dtype=torch.float64)
        tokens = torch.zeros(int(starts[-1]) if per_token else 0)
        done = np.zeros(len(lengths), bool)
        for step in self.steps:
            fresh = [self._fresh(part, done) for part in step]  # of every rank, so that each response is one rank's
            count = sum(int(part.sum()) for part in fresh)
            if count == 0:
                continue
            batch, mine = step[self.ranks.rank] or [0], fresh[self.ranks.rank]
            rows = pack([self.groups.tree(i) for i in batch])
            found = policy(rows, self.temperature)
            sums = rows.sum_per_response(found).cpu().double()
            if len(mine):
                places = self._members(batch)
                logps[places[mine]] = sums[mine]
                parts = found.cpu().float().split(rows.counts.tolist()) if per_token else ()
                for place, part, is_mine in zip(places, parts, mine, strict=False):
                    if is_mine:
                        tokens[starts[place] : starts[place + 1]] = part
            report(count, "")
        columns: dict[str, Any] = {name: self.ranks.all_reduce_sum(logps).numpy()}
        if per_token:
            values = pa.array(self.ranks.all_reduce_sum(tokens).numpy())
            columns[per_token] = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
        return columns

    def _members(self, batch: Sequence[int]) -> np.ndarray:
        return np.concatenate([self.groups.rows(i) for i in batch])

    def _fresh(self, part: list[int], done: np.ndarray) -> np.ndarray:
        """Which responses of a micro-batch have not come before; they count as done from here on."""
        places = self._members(part) if part else np.zeros(0, np.int64)
        first = np.zeros(len(places), bool)
        first[np.unique(places, return_index=True)[1]] = True
        fresh = first & ~done[places]
        done[places] = True
        return fresh

    def apart(self, policy: LogpsFunction, reported: np.ndarray) -> float | None:
        """Mean absolute difference of a first batch's log-probs to those reported, nats a token."""
        batch = next((step[0] for step in self.steps if step[0]), [])
        if not batch:
            return None
        rows = pack([self.groups.tree(i) for i in batch])
        own = rows.sum_per_response(policy(rows, self.temperature)).cpu().double().numpy()
        return float(np.abs(own - reported[self._members(batch)]).sum() / len(rows.targets))


def _reported_by_sampler(stored: Round, groups: StoredGroups) -> np.ndarray:
    """What the sampler reported of the used responses, shape (R,), float64, nats."""
    sampled = stored.read("responses", [*KEY, "sampler_logp"])
    if sampled["sampler_logp"].null_count:
        raise InputError(
            f"`rollout.old_logps` is sampler, but the answers of {stored.path} were drawn without noting log-probs. "
            "Set it to policy for this round, or move the round's folder away to draw its answers again."
        )
    wanted = pa.table({KEY[0]: groups.prompt_ids, KEY[1]: groups.indices, "place": np.arange(len(groups.indices))})
    found = wanted.join(sampled, list(KEY)).sort_by("place")
    return pc.cast(found["sampler_logp"], pa.float64()).to_numpy()
