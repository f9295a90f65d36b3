"""Which held-out prompts a report shows, and which response stands for each."""

import itertools
import json
import statistics
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.models.chat import message_text
from rlhf_pl.store.round_store import Round, RoundStore


def prompts_of_median_gain(store: RoundStore, version: int, count: int) -> list[str]:
    """The `count` prompts that show the median gain best, in the order of the data.

    Their gain in mean reward is near the median over the prompts, and so is the difference between two of their
    responses, one before and one after: the sum of both distances is smallest. Prompts without a reward before or
    after are left out; of equally near ones the earlier counts.
    """
    before, after = _rewards(store.held_out(0)), _rewards(store.held_out(version))
    gains = {i: fmean(after[i].values()) - fmean(before[i].values()) for i in before if i in after}
    if not gains:
        return []
    middle = statistics.median(gains.values())

    def distance(prompt_id: str) -> float:
        old, new = before[prompt_id], after[prompt_id]
        i, j = _nearest_gain(old, new)
        return round(abs(gains[prompt_id] - middle) + abs(new[j] - old[i] - gains[prompt_id]), 9)

    nearest = sorted(gains, key=distance)[: max(0, count)]
    return [prompt_id for prompt_id in gains if prompt_id in nearest]


def typical_pairs(
    before: Round, after: Round, prompt_ids: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """For each prompt the response before and the one after whose difference in reward is nearest the prompt's gain.

    Of equally near pairs it is the one with rewards nearest their means, then the first. A prompt that has rewards on
    one side alone gets the response nearest its mean there; `typical_responses` describes the rows.
    """
    old, new = _rewards(before, prompt_ids), _rewards(after, prompt_ids)
    chosen = {
        prompt_id: _nearest_gain(old[prompt_id], new[prompt_id])
        for prompt_id in prompt_ids
        if prompt_id in old and prompt_id in new
    }
    rows = (
        typical_responses(stored, prompt_ids, {prompt_id: pair[side] for prompt_id, pair in chosen.items()})
        for side, stored in enumerate((before, after))
    )
    return next(rows), next(rows)


def typical_responses(
    stored: Round, prompt_ids: list[str], chosen: Mapping[str, int] | None = None
) -> dict[str, dict[str, Any]]:
    """For each prompt its response whose reward is nearest the mean of its rewards, the first of equally near ones.

    Args:
        stored: The round.
        prompt_ids: Ids of the prompts.
        chosen: Indices of responses to take instead, by prompt id.

    Returns:
        Rows by prompt id, with `reward`, `mean` and `count` of the prompt's rewards, and `question`, the last message.
        Prompts without a scored response are left out.
    """
    scores = _rewards(stored, prompt_ids)
    indices = {prompt_id: _nearest_mean(found) for prompt_id, found in scores.items()} | dict(chosen or {})
    wanted = pa.array(prompt_ids, pa.string())
    shown: dict[str, dict[str, Any]] = {}
    for table in stored.read_shards("responses", ["prompt_id", "response_index", "prompt", "response"]):
        for row in table.filter(pc.is_in(table["prompt_id"], wanted)).to_pylist():
            prompt_id = row["prompt_id"]
            if indices.get(prompt_id) == row["response_index"]:
                found = scores[prompt_id]
                numbers = {"reward": found[indices[prompt_id]], "mean": fmean(found.values())}
                question = message_text(json.loads(row["prompt"])[-1])
                shown[prompt_id] = row | numbers | {"count": len(found), "question": question}
    return shown


def _rewards(stored: Round, prompt_ids: list[str] | None = None) -> dict[str, dict[int, float]]:
    """Rewards of the scored responses to all or some prompts, by prompt id and response index."""
    table = stored.read("rewards", ["prompt_id", "response_index", "reward"])
    table = table.filter(table["reward"].is_valid())
    if prompt_ids is not None:
        table = table.filter(pc.is_in(table["prompt_id"], pa.array(prompt_ids, pa.string())))
    scores: dict[str, dict[int, float]] = {}
    for row in table.to_pylist():
        scores.setdefault(row["prompt_id"], {})[row["response_index"]] = row["reward"]
    return scores


def _nearest_mean(rewards: Mapping[int, float]) -> int:
    mean = fmean(rewards.values())
    return min(sorted(rewards), key=lambda index: abs(rewards[index] - mean))


def _nearest_gain(old: Mapping[int, float], new: Mapping[int, float]) -> tuple[int, int]:
    before, after = fmean(old.values()), fmean(new.values())

    def distances(pair: tuple[int, int]) -> tuple[float, float]:
        i, j = pair
        from_means = abs(old[i] - before) + abs(new[j] - after)
        return round(abs((new[j] - old[i]) - (after - before)), 9), round(from_means, 9)

    return min(itertools.product(sorted(old), sorted(new)), key=distances)
