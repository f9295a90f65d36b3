"""What is logged about a round and about the answers to the held-out prompts."""

import json
import math
from typing import Any

from rlhf_pl.rounds import Round, RoundStore
from rlhf_pl.stages import prompt_means
from rlhf_pl.stages.kl import STAGE


def held_out_metrics(store: RoundStore, version: int) -> dict[str, float]:
    """Metrics of the policy after `version` rounds on the held-out prompts.

    `val/win_rate` is the share of prompts on which its mean reward beats that of the starting policy, ties counting
    half; `val/reward_gain` is the mean difference to it and `val/reward_gain_se` that difference's standard error,
    over prompts. `val/kl_new_old` and `val/kl_new_reference` are KL(new || old) and KL(new || reference), estimated
    from its responses, and `..._se` their standard errors.
    """
    stored = store.held_out(version)
    answers, rewards = stored.info("responses"), stored.info("rewards")
    now, before = prompt_means(stored), prompt_means(store.held_out(0))
    gains = [now[prompt_id] - before[prompt_id] for prompt_id in now if prompt_id in before]
    mean = sum(gains) / max(1, len(gains))
    variance = sum((g - mean) ** 2 for g in gains) / max(1, len(gains) - 1)
    return {
        "val/reward_mean": rewards["mean"],
        **{f"val/reward/{name}": value for name, value in rewards.get("components", {}).items()},
        "val/reward_gain": mean,
        "val/reward_gain_se": math.sqrt(variance / max(1, len(gains))),
        "val/win_rate": sum(1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gains) / max(1, len(gains)),
        "val/response_tokens": answers["tokens_mean"],
        "val/finished_share": answers["finished_share"],
        **{f"val/kl_{name}": value for name, value in policy_kl(stored).items()},
        "time/evaluate_s": answers["seconds"] + rewards["seconds"],
    }


def policy_kl(stored: Round) -> dict[str, float]:
    """Of the policy that answered in an evaluation: `new_old`, `new_old_se` and the like, as far as they are known."""
    return {k: v for k, v in stored.manifest["stages"].get(STAGE, {}).items() if k.startswith("new_")}


def round_metrics(stored: Round) -> dict[str, float]:
    """Metrics of a prepared round."""
    stages = stored.manifest["stages"]
    answers, rewards, pairs = stages["responses"], stages["rewards"], stages["pairs"]
    return {
        "rollout/reward_mean": rewards["mean"],
        "rollout/reward_std": rewards["std"],
        "rollout/reward_best": rewards["best"],
        "rollout/reward_worst": rewards["worst"],
        **{f"rollout/reward/{name}": value for name, value in rewards["components"].items()},
        "rollout/truncated": float(rewards.get("truncated", 0)),
        **{f"rollout/penalty/{name}": pairs["penalties"][name] for name in _penalties(pairs)},
        "rollout/response_tokens": answers["tokens_mean"],
        "rollout/finished_share": answers["finished_share"],
        "rollout/pairs": pairs["pairs"],
        "time/generate_s": answers["seconds"],
        "time/score_s": rewards["seconds"],
        "time/logps_s": stages["logps"]["seconds"],
        **_difference(stages["logps"]),
    }


def _difference(logps: dict[str, Any]) -> dict[str, float]:
    """Where the sampler's log-probs are taken: how far they are from the policy's, nats a token."""
    found = logps.get("sampler_difference")
    return {} if found is None else {"rollout/old_logp_difference": found}


def _penalties(pairs: dict[str, Any]) -> list[str]:
    """The penalties that took something off."""
    return [name for name in ("missing_eos", "length") if pairs.get("penalties", {}).get(name)]


def first_answers(stored: Round) -> dict[str, dict[str, Any]]:
    """Of every prompt its first answer's row, with its `reward` and the last message as `question`, by prompt id."""
    rows = stored.read("responses").select(["prompt_id", "response_index", "prompt", "response"]).to_pylist()
    rewards = stored.read("rewards")["reward"].to_pylist()
    return {
        row["prompt_id"]: row | {"reward": reward, "question": json.loads(row["prompt"])[-1]["content"]}
        for row, reward in zip(rows, rewards, strict=True)
        if row["response_index"] == 0
    }
