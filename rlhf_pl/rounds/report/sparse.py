"""Prompts that teach a round nothing, because their rewards are equal, and what to do about it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_pl.store.round_store import Round

_MANY = 0.5  # share of a round's prompts from which on advice is given
_FEW_FINISHED = 0.5  # share of finished responses below which the length is worth a word


def describe_sparsity(stored: Round) -> dict[str, str]:
    """Advice for a round in which at least half of the prompts teach nothing, by cause; empty for other rounds."""
    stages = stored.manifest["stages"]
    responses, pairs = stages["responses"], stages["pairs"]
    prompts, number = pairs.get("prompts", 0), responses["sampling"]["num_responses"]
    if not prompts:
        return {}
    dropped = pairs.get("dropped", {})
    equal = pairs.get("equal_rewards") or 0
    found = {
        "equal": dropped.get("no_reward_difference", 0) + equal if number > 1 else 0,
        "identical": dropped.get("same_answer", 0),
        "not_scored": dropped.get("not_scored", 0),
        "truncated": dropped.get("truncated_response", 0),
    }
    return {cause: _advice(cause, count, prompts, stored)
            for cause, count in found.items() if count >= _MANY * prompts}  # fmt: skip


def _advice(cause: str, count: int, prompts: int, stored: Round) -> str:
    manifest = stored.manifest
    sampling = manifest["stages"]["responses"]["sampling"]
    share = f"{count} of {prompts} prompts ({count / prompts:.0%})"
    more = f"`rollout.sampling.num_responses` (now {sampling['num_responses']})"
    warmer = f"`rollout.sampling.temperature` (now {sampling['temperature']:g})"
    if cause == "identical":
        return f"the responses to {share} are identical; raise {warmer} or {more}"
    if cause == "not_scored":
        return f"{share} have too few responses with a reward; `rlhf-pl rounds` counts the failures by kind"
    if cause == "truncated":
        longest = f"`rollout.sampling.max_response_tokens` (now {sampling['max_response_tokens']})"
        return f"{share} have a truncated response, so `rollout.drop_truncated` leaves them out; raise {longest}"
    text, solved = f"{share} teach nothing: the rewards of their responses do not differ", _share_at_top(stored)
    floor = manifest.get("settings", {}).get("pairs", {}).get("selector", "")
    if "min_margin=" in floor and "min_margin=0.0" not in floor:
        text += " by more than `rollout.selector`'s min_margin"
    finished = manifest["stages"]["responses"]["finished_share"]
    length = f", raise `rollout.sampling.max_response_tokens` ({finished:.0%} of the responses finished)"
    length = length if finished < _FEW_FINISHED else ""
    refill = ", set `rollout.refill` to sample other prompts in their place" if _can_refill(manifest) else ""
    if solved > 0.5:
        return f"{text}, most of them at the highest reward; use harder prompts or a stricter reward{refill}"
    shape = "give partial credit in the reward or shape it (`rollout.shaping`)"
    return f"{text}; raise {more} or {warmer}, {shape}{length}{refill}"


def _can_refill(manifest: Mapping[str, Any]) -> bool:
    """Whether the round leaves prompts to refill it from, and is not refilled yet."""
    settings, prompts = manifest.get("settings", {}).get("responses", {}), manifest.get("prompts", {})
    return "refill" not in settings and prompts.get("in_round", 0) < prompts.get("training", 0)


def _share_at_top(stored: Round) -> float:
    """Share of the prompts with equal rewards whose reward is the round's highest; 0 where all rewards are equal."""
    table = stored.read("rewards", ["prompt_id", "reward"])
    scored = table.filter(table["reward"].is_valid()).group_by("prompt_id", use_threads=False)
    grouped = scored.aggregate([("reward", "max"), ("reward", "min")])
    high, low = (grouped[f"reward_{name}"].to_numpy() for name in ("max", "min"))
    equal = high == low
    if not equal.any() or high.max() == low.min():
        return 0.0
    return float(np.mean(high[equal] == high.max()))
