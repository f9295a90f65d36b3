"""What is logged about a round and about the answers to the held-out prompts."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.models.chat import message_text
from rlhf_pl.rewards import CombinedReward, FunctionReward, HTTPReward, Reward
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.rounds.stages import prompt_means
from rlhf_pl.rounds.stages.kl import STAGE
from rlhf_pl.store.round_store import Round, RoundStore

KL_NOTE = "KL: mean log-ratio of responses sampled from the first policy named (k1), nats per response"
# Names that callbacks may monitor, parts of rewards and penalties aside.
HELD_OUT = (
    "val/reward_mean",
    "val/reward_gain",
    "val/reward_gain_se",
    "val/win_rate",
    "val/response_tokens",
    "val/finished_share",
    "val/kl_new_old",
    "val/kl_new_old_se",
    "val/kl_new_reference",
    "val/kl_new_reference_se",
    "time/evaluate_s",
)
ROLLOUT = (
    "rollout/reward_mean",
    "rollout/reward_std",
    "rollout/reward_best",
    "rollout/reward_worst",
    "rollout/truncated",
    "rollout/response_tokens",
    "rollout/finished_share",
    "rollout/pairs",
    "rollout/distinct_3",
    "rollout/identical_share",
    "rollout/sampler_logp_error",
    "rollout/old_logp_difference",
    "guard/warnings",
    "train/round_loss",
    "train/round_kl",
    "train/pairs_per_s",
    "system/resident_gib",
    "time/train_s",
    "time/sync_s",
    "time/generate_s",
    "time/score_s",
    "time/logps_s",
)


def metric_names(options: RoundOptions, has_reference: bool, held_out: bool) -> list[str]:
    """What will be measured of a run's rounds. Names that end in a slash stand for all that begin so.

    Args:
        options: How its rounds are made.
        has_reference: Whether KL to a reference is measured.
        held_out: Whether it has held-out prompts.
    """
    greedy = options.val_sampling.temperature == 0
    lacking = {
        "rollout/old_logp_difference": options.old_logps == "policy",
        "val/kl_new_old": greedy,
        "val/kl_new_reference": greedy or not has_reference,
    }
    absent = {name for name, lacks in lacking.items() if lacks}
    names = [n for n in (*ROLLOUT, *(HELD_OUT if held_out else ())) if n.removesuffix("_se") not in absent]
    names += [f"rollout/penalty/{name}" for name in options.shaping.penalties]
    parts = _parts(options.reward)
    return names + [f"{of}/reward/{part}" for of in ("rollout", *(("val",) if held_out else ())) for part in parts]


def _parts(reward: Reward) -> list[str]:
    """Names of a reward's components; an empty one where it may have any."""
    if isinstance(reward, CombinedReward):
        named = list(zip(reward.names, reward.parts, strict=True))
        return [*reward.names, *(f"{name}/{part}" for name, of in named for part in _parts(of))]
    is_ours = type(reward).__module__.partition(".")[0] == "rlhf_pl"
    return [] if is_ours and not isinstance(reward, HTTPReward | FunctionReward) else [""]


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


def sync_metrics(store: RoundStore, index: int) -> dict[str, float]:
    """Metrics of the sync of the weights that answered in round `index`, and in the evaluation before it."""
    return {**store.held_out(index).manifest.get("sync", {}), **store.round(index).manifest.get("sync", {})}


def training_metrics(stored: Round, passes: int) -> dict[str, float]:
    """Metrics of a round that was trained on, so many times."""
    training = stored.info("training")
    pairs = passes * stored.info("pairs")["pairs"] if stored.is_complete("pairs") else 0
    return {
        "time/train_s": training["seconds"],
        **({"train/pairs_per_s": pairs / training["seconds"]} if training["seconds"] else {}),  # else lost
        **{f"train/round_{name}": training[name] for name in ("loss", "kl") if training.get(name) is not None},
    }


def _difference(logps: dict[str, Any]) -> dict[str, float]:
    """Where the sampler's log-probs are taken: how far they are from the policy's, nats a token."""
    found = logps.get("sampler_difference")
    return {} if found is None else {"rollout/old_logp_difference": found}


def _penalties(pairs: dict[str, Any]) -> list[str]:
    """The penalties of the round, also where they took nothing off."""
    return [name for name in ("missing_eos", "length") if name in pairs.get("penalties", {})]


def prompt_ids(stored: Round) -> list[str]:
    """The prompts whose responses were scored, in their order."""
    return pc.unique(stored.read("rewards", ["prompt_id"])["prompt_id"]).to_pylist()


def first_answers(stored: Round, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The first response's row of each wanted prompt, with its `reward` and the last message as `question`, by id."""
    columns = ["prompt_id", "response_index", "prompt", "response"]
    found: dict[str, dict[str, Any]] = {}
    stages = (stored.read_shards("responses", columns), stored.read_shards("rewards", ["reward"]))
    for rows, rewards in zip(*stages, strict=True):
        asked = pc.is_in(rows["prompt_id"], pa.array(wanted, pa.string()))
        table = rows.append_column("reward", rewards["reward"])
        for row in table.filter(pc.and_(asked, pc.equal(rows["response_index"], 0))).to_pylist():
            found[row["prompt_id"]] = row | {"question": message_text(json.loads(row["prompt"])[-1])}
        if len(found) == len(wanted):
            break
    return found
