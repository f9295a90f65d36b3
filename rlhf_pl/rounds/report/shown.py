"""Which held-out prompts a report shows, and which response stands for each."""

import json
import statistics
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.models.chat import message_text
from rlhf_pl.rounds.stages import prompt_means
from rlhf_pl.store.round_store import Round, RoundStore


def prompts_of_median_gain(store: RoundStore, version: int, count: int) -> list[str]:
    """The `count` prompts whose gain in mean reward is nearest the median, in the order of the data.

    Prompts without a reward before or after are left out; of equally near ones the earlier counts.
    """
    before, after = prompt_means(store.held_out(0)), prompt_means(store.held_out(version))
    gains = {prompt_id: after[prompt_id] - before[prompt_id] for prompt_id in before if prompt_id in after}
    if not gains:
        return []
    middle = statistics.median(gains.values())
    nearest = sorted(gains, key=lambda prompt_id: abs(gains[prompt_id] - middle))[: max(0, count)]
    return [prompt_id for prompt_id in gains if prompt_id in nearest]


def typical_responses(stored: Round, prompt_ids: list[str]) -> dict[str, dict[str, Any]]:
    """For each prompt its response whose reward is nearest the mean of its rewards, the first of equally near ones.

    Returns:
        Rows by prompt id, with `reward`, `mean` and `count` of the prompt's rewards, and `question`, the last message.
        Prompts without a scored response are left out.
    """
    wanted = pa.array(prompt_ids, pa.string())
    rewards = stored.read("rewards", ["prompt_id", "response_index", "reward"])
    scored = rewards.filter(pc.and_(pc.is_in(rewards["prompt_id"], wanted), rewards["reward"].is_valid()))
    scores: dict[str, dict[int, float]] = {}
    for row in scored.to_pylist():
        scores.setdefault(row["prompt_id"], {})[row["response_index"]] = row["reward"]
    chosen = {prompt_id: _nearest_mean(found) for prompt_id, found in scores.items()}
    shown: dict[str, dict[str, Any]] = {}
    for table in stored.read_shards("responses", ["prompt_id", "response_index", "prompt", "response"]):
        for row in table.filter(pc.is_in(table["prompt_id"], wanted)).to_pylist():
            prompt_id = row["prompt_id"]
            if chosen.get(prompt_id) == row["response_index"]:
                found = scores[prompt_id]
                numbers = {"reward": found[chosen[prompt_id]], "mean": statistics.fmean(found.values())}
                question = message_text(json.loads(row["prompt"])[-1])
                shown[prompt_id] = row | numbers | {"count": len(found), "question": question}
    return shown


def _nearest_mean(rewards: Mapping[int, float]) -> int:
    mean = statistics.fmean(rewards.values())
    return min(sorted(rewards), key=lambda index: abs(rewards[index] - mean))
