"""How far a policy is from others, from the responses that it has sampled to the held-out prompts."""

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.packed_batch import PackedBatch, PrefixGroup, pack
from rlhf_pl.rounds.stages.generate import Report
from rlhf_pl.rounds.stages.logps import LogpsFunction, steps_by_length
from rlhf_pl.store.round_store import Round

STAGE = "kl"


def estimate_kl(per_prompt: Sequence[Sequence[float]]) -> tuple[float, float]:
    """KL(new || other) per response, nats, and its standard error, from responses that the new policy has sampled.

    The estimator is the plain mean of log pi_new(y|x) - log pi_other(y|x) ("k1"), which is unbiased; prompts count
    alike. The error is that over prompts, whose responses are not independent of each other; 0 for one prompt.

    Args:
        per_prompt: The log-ratios, nats, of each prompt's responses; not empty.
    """
    means = [statistics.fmean(ratios) for ratios in per_prompt]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return statistics.fmean(means), error


def response_logps(
    trees: Sequence[PrefixGroup],
    policy: LogpsFunction,
    temperature: float,
    tokens_per_batch: int,
    ranks: Ranks,
    report: Report = lambda count, note: None,
) -> Tensor:
    """Summed log-probs of all responses, prompt by prompt, shape (responses,), float64; all ranks call it."""
    first = [0]
    for tree in trees:
        first.append(first[-1] + len(tree.responses))
    logps = torch.zeros(first[-1], dtype=torch.float64)
    for step in steps_by_length(tokens_per_batch, ranks)([len(tree) for tree in trees]):
        mine = step[ranks.rank]
        rows: PackedBatch = pack([trees[i] for i in mine or [0]])  # sharded policies need all ranks at every call
        found = rows.sum_per_response(policy(rows, temperature)).cpu().double()
        if mine:
            logps[[k for i in mine for k in range(first[i], first[i + 1])]] = found
        report(sum(len(trees[i].responses) for part in step for i in part), "")
    return ranks.all_reduce_sum(logps)


def sampled_trees(stored: Round) -> list[PrefixGroup]:
    """Every prompt of an evaluation with its responses, whose tokens stay in Arrow."""
    table = stored.read("responses", ["prompt_id", "prompt_tokens", "response_tokens"])
    prompts, responses = (table[name].combine_chunks() for name in ("prompt_tokens", "response_tokens"))
    places: dict[str, list[int]] = {}
    for place, prompt_id in enumerate(table["prompt_id"].to_pylist()):
        places.setdefault(prompt_id, []).append(place)
    return [
        PrefixGroup(prompts[rows[0]].values.to_numpy(), tuple(responses[row].values.to_numpy() for row in rows))
        for rows in places.values()
    ]


def note_kl(stored: Round, trees: Sequence[PrefixGroup], logps: dict[str, Tensor], started: float) -> None:
    """Write the estimates into the manifest: `new_<other>` and `new_<other>_se` for each other policy.

    Args:
        stored: The evaluation.
        trees: Its prompts and responses.
        logps: Of every response under `new` and the others, each of shape (responses,).
        started: When that began, `time.monotonic()`.
    """
    numbers: dict[str, float] = {}
    sizes = [len(tree.responses) for tree in trees]
    for other in logps:
        if other != "new":
            ratios = (logps["new"] - logps[other]).split(sizes)
            numbers[f"new_{other}"], numbers[f"new_{other}_se"] = estimate_kl([r.tolist() for r in ratios])
    stored.complete(STAGE, seconds=time.monotonic() - started, **numbers)
