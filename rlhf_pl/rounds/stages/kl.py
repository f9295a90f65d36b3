"""KL of a policy to other policies, estimated from its responses to the held-out prompts."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.rounds.stages.generate import Report
from rlhf_pl.rounds.stages.logps import LogpsFunction, divide_by_length
from rlhf_pl.store.round_store import Round

STAGE = "kl"
SPREAD = "rms_old"  # root mean square of the log-ratio of a response to pi_old, nats


def estimate_kl(per_prompt: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Estimate KL(new || other) and its standard error, nats per response, from responses of the new policy.

    The estimator is the plain mean of log pi_new(y|x) - log pi_other(y|x) ("k1"), which is unbiased; all prompts count
    equally. The standard error is over prompts, because the responses to one prompt are not independent; 0 for one
    prompt.

    Args:
        per_prompt: Log-ratios of each prompt's responses, nats; not empty.
    """
    means = [statistics.fmean(ratios) for ratios in per_prompt]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return statistics.fmean(means), error


def response_logps(
    groups: Sequence[PrefixGroup],
    policy: LogpsFunction,
    temperature: float,
    tokens_per_batch: int,
    ranks: Ranks,
    report: Report = lambda count, note: None,
) -> Tensor:
    """Summed log-probs of all responses, group by group, shape (responses,), float64; all ranks call it."""
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + len(group.responses))
    logps = torch.zeros(starts[-1], dtype=torch.float64)
    for step in divide_by_length([len(group) for group in groups], tokens_per_batch, ranks):
        mine = step[ranks.rank]
        rows: PackedBatch = pack([groups[i] for i in mine or [0]])  # sharded policies need all ranks at every call
        sums = rows.sum_per_response(policy(rows, temperature)).cpu().double()
        if mine:
            logps[[k for i in mine for k in range(starts[i], starts[i + 1])]] = sums
        report(sum(len(groups[i].responses) for part in step for i in part), "")
    return ranks.all_reduce_sum(logps)


def read_prefix_groups(stored: Round) -> list[PrefixGroup]:
    """Read an evaluation's prompts with their responses; their tokens stay in Arrow."""
    table = stored.read("responses", ["prompt_id", "prompt_tokens", "response_tokens"])
    prompts, responses = (table[name].combine_chunks() for name in ("prompt_tokens", "response_tokens"))
    rows_of: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(table["prompt_id"].to_pylist()):
        rows_of.setdefault(prompt_id, []).append(row)
    return [
        PrefixGroup(prompts[rows[0]].values.to_numpy(), tuple(responses[row].values.to_numpy() for row in rows))
        for rows in rows_of.values()
    ]


def write_kl(stored: Round, groups: Sequence[PrefixGroup], logps: dict[str, Tensor], started: float) -> None:
    """Write the estimates into the manifest: `new_<other>` and `new_<other>_se` for each other policy, and `SPREAD`.

    Args:
        stored: The evaluation.
        groups: Its prompts and responses.
        logps: Summed log-probs of every response under `new` and each other policy, shape (responses,).
        started: `time.monotonic()` at the start of the computation.
    """
    numbers: dict[str, float] = {}
    sizes = [len(group.responses) for group in groups]
    for other in logps:
        if other != "new":
            ratios = (logps["new"] - logps[other]).split(sizes)
            numbers[f"new_{other}"], numbers[f"new_{other}_se"] = estimate_kl([r.tolist() for r in ratios])
    if "old" in logps:
        numbers[SPREAD] = float((logps["new"] - logps["old"]).square().mean().sqrt())
    stored.complete(STAGE, seconds=time.monotonic() - started, **numbers)
