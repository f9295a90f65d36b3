"""Log-probs of a round's training responses under the policies that do not train."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rlhf_pl.data.mismatched import mismatch_prompts
from rlhf_pl.data.stored_groups import KEY, MISMATCHED, StoredGroups, read_stored_groups
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch, batches_by_length, pack
from rlhf_pl.rounds.stages.generate import Report
from rlhf_pl.rounds.stages.unused import read_unused
from rlhf_pl.store.round_store import Round

LogpsFunction = Callable[[PackedBatch, float], Tensor]
Steps = list[list[list[int]]]  # [step][rank] -> indices of the groups in that micro-batch
Division = Callable[[StoredGroups], tuple[StoredGroups, Steps]]  # the same responses in the groups of the steps
_SHARD_ROWS = 1 << 15  # limits memory: one file with every token's log-prob would be in memory twice


def divide_by_length(lengths: Sequence[int], tokens_per_batch: int, ranks: Ranks) -> Steps:
    """Divide groups, by their lengths, among steps and ranks.

    Groups of similar length share a micro-batch of at most `tokens_per_batch` tokens.
    """
    batches = list(batches_by_length([range(n) for n in lengths], tokens_per_batch))
    parts = (batches[start : start + ranks.size] for start in range(0, len(batches), ranks.size))
    return [part + [[]] * (ranks.size - len(part)) for part in parts]


def steps_by_length(tokens_per_batch: int, ranks: Ranks) -> Division:
    """Function that divides groups by their lengths: see `divide_by_length`."""
    return lambda groups: (groups, divide_by_length(groups.lengths(), tokens_per_batch, ranks))


def mismatched_by_length(tokens_per_batch: int, ranks: Ranks) -> Division:
    """The same for responses under the prompts of other groups."""

    def divide(groups: StoredGroups) -> tuple[StoredGroups, Steps]:
        others = mismatch_prompts(groups)
        return (groups, []) if others is None else steps_by_length(tokens_per_batch, ranks)(others)

    return divide


def store_logps(
    stored: Round,
    policies: Mapping[str, LogpsFunction],
    divide: Division,
    temperature: float,
    report: Report = lambda count, note: None,
    ranks: Ranks = Ranks(),  # noqa: B008 - one process
    needs: Collection[str] = (),
    given: Mapping[str, np.ndarray] | None = None,
    check_sampler_with: LogpsFunction | None = None,
    extra: Mapping[str, LogpsFunction] | None = None,
    known: Callable[[StoredGroups], Mapping[str, Any]] | None = None,
    divide_unused: Division | None = None,
    mismatched: Division | None = None,
    known_from: Collection[str] = (),
    copies: Mapping[str, str] | None = None,
) -> None:
    """Store the log-probs of each response that is used, under each of `policies` (`old`, `reference`).

    Args:
        stored: The round. Its groups are read and its `logps` written, a row per response.
        policies: (rows, temperature) -> log-probs of the M targets, shape (M,), by name.
        divide: Groups -> (these, or parts of them; which are computed together). For a round that trains these are the
            training's own micro-batches: the last digits of log-probs depend on what is computed together, so there an
            unchanged policy gives identical numbers. A response that occurs again is skipped.
        temperature: The temperature that the responses were sampled at.
        report: Receives (responses done, note).
        ranks: The run's ranks. Sharded policies need all of them at every call: a rank without a group computes the
            first group and discards the result.
        needs: Names of per-token log-probs to store as well, for example `old_token_logps`; sums are always stored.
        given: Known sums, shape (R,), by the name of their policy.
        check_sampler_with: The policy, where the sampler's log-probs are known as `old`; the mean difference to this
            policy's is then measured on one batch.
        extra: Other per-token values to compute, by name in `needs`; without their sums.
        known: Returns further columns, of values that came with the round: a value per response of these groups.
        divide_unused: Divides, like `divide`, the groups of the scored responses that are not used. With it their
            log-probs under `old` are stored after those of the others, and per token for all of them.
        mismatched: Divides the responses under the prompts of other groups, where their log-probs under the reference
            are needed as well.
        known_from: Names of what `known` comes from, for the manifest.
        copies: Columns that repeat others, by name.
    """
    started = time.monotonic()
    groups = read_stored_groups(stored)
    steps = _Steps(*(divide(groups) if len(groups) else (groups, [])), temperature, ranks)
    columns: dict[str, Any] = {KEY[0]: groups.prompt_ids, KEY[1]: groups.indices}
    needs = needs if divide_unused is None else {*needs, "old_token_logps"}
    for name, policy in policies.items():
        per_token = f"{name}_token_logps"
        columns |= steps.logps(policy, f"{name}_logp", per_token if per_token in needs else None, report)
    for name, function in (extra or {}).items():
        columns |= steps.logps(function, None, name, report)
    if mismatched is not None:
        others = _Steps(*(mismatched(groups) if len(groups) else (groups, [])), temperature, ranks)
        columns |= others.logps(policies["reference"], MISMATCHED, None, report)
    columns |= {f"{name}_logp": values for name, values in (given or {}).items()}
    columns |= {} if known is None else known(groups)
    columns |= {name: columns[other] for name, other in (copies or {}).items()}
    difference = {}
    if check_sampler_with is not None:
        reported = pa.array(columns["old_logp"]).to_numpy()
        if (mean := steps.mean_difference(check_sampler_with, reported)) is not None:
            difference = {"sampler_difference": mean}

    table = pa.table(columns)
    if divide_unused is not None and len(unused := read_unused(stored, groups)):
        others = _Steps(*divide_unused(unused), temperature, ranks)
        values = others.logps(policies["old"], "old_logp", "old_token_logps", report)
        rest = pa.table({KEY[0]: unused.prompt_ids, KEY[1]: unused.indices, **values})
        table = pa.concat_tables([table, rest], promote_options="default")

    def write() -> None:
        for number, start in enumerate(range(0, max(1, len(table)), _SHARD_ROWS)):
            stored.write_shard("logps", number, table.slice(start, _SHARD_ROWS))
        names = [*(["given"] if given else []), *known_from, *policies]
        stored.complete("logps", seconds=time.monotonic() - started, policies=names, **difference)

    ranks.run_on_rank_zero(write)


class _Steps:
    """The forward passes over a round's groups, divided among ranks."""

    def __init__(self, groups: StoredGroups, steps: Steps, temperature: float, ranks: Ranks) -> None:
        self.groups, self.steps, self.temperature, self.ranks = groups, steps, temperature, ranks

    def logps(self, policy: LogpsFunction, name: str | None, per_token: str | None, report: Report) -> dict[str, Any]:
        """Compute the columns `name`, of sums, and `per_token`, unless they are None; all ranks call it."""
        lengths = self.groups.response_lengths()
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        logps = torch.zeros(len(lengths), dtype=torch.float64)
        tokens = torch.zeros(int(starts[-1]) if per_token else 0)
        done = np.zeros(len(lengths), bool)
        for step in self.steps:
            is_new = [self._mark_new(part, done) for part in step]  # for all ranks: each response is one rank's
            count = sum(int(part.sum()) for part in is_new)
            if count == 0:
                continue
            batch, mine = step[self.ranks.rank] or [0], is_new[self.ranks.rank]
            rows = pack([self.groups.prefix_group(i) for i in batch])
            token_logps = policy(rows, self.temperature)
            sums = rows.sum_per_response(token_logps).cpu().double()
            if len(mine):
                responses = self._responses(batch)
                logps[responses[mine]] = sums[mine]
                parts = token_logps.cpu().float().split(rows.counts.tolist()) if per_token else ()
                for response, part, is_mine in zip(responses, parts, mine, strict=False):
                    if is_mine:
                        tokens[starts[response] : starts[response + 1]] = part
            report(count, "")
        columns: dict[str, Any] = {} if name is None else {name: self.ranks.all_reduce_sum(logps).numpy()}
        if per_token:
            values = pa.array(self.ranks.all_reduce_sum(tokens).numpy())
            columns[per_token] = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)
        return columns

    def _responses(self, batch: Sequence[int]) -> np.ndarray:
        """Indices of the responses in a micro-batch."""
        return np.concatenate([self.groups.rows(i) for i in batch])

    def _mark_new(self, batch: list[int], done: np.ndarray) -> np.ndarray:
        """Whether each response of a micro-batch occurs for the first time; marks all of them as done."""
        responses = self._responses(batch) if batch else np.zeros(0, np.int64)
        is_first = np.zeros(len(responses), bool)
        is_first[np.unique(responses, return_index=True)[1]] = True
        is_new = is_first & ~done[responses]
        done[responses] = True
        return is_new

    def mean_difference(self, policy: LogpsFunction, reported: np.ndarray) -> float | None:
        """Mean absolute difference between the first batch's log-probs and the reported ones, nats a token."""
        batch = next((step[0] for step in self.steps if step[0]), [])
        if not batch:
            return None
        rows = pack([self.groups.prefix_group(i) for i in batch])
        own = rows.sum_per_response(policy(rows, self.temperature)).cpu().double().numpy()
        return float(np.abs(own - reported[self._responses(batch)]).sum() / len(rows.targets))
