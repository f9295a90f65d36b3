"""Logged metrics of a round and of the responses to the held-out prompts."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.data.round_choice import ENTRY
from rlhf_pl.models.chat import message_text
from rlhf_pl.rewards import CombinedReward, FunctionReward, HTTPReward, Reward
from rlhf_pl.rewards.stored import StoredReward
from rlhf_pl.rounds.report.numbers import is_negligible
from rlhf_pl.rounds.settings import RoundOptions
from rlhf_pl.rounds.stages import prompt_means
from rlhf_pl.rounds.stages.kl import STAGE
from rlhf_pl.store.round_store import Round, RoundStore

KL_NOTE = "KL: mean log-ratio of responses sampled from the first policy named (k1), nats per response"
# Names that callbacks may monitor, in addition to components of rewards and to penalties.
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
# What callbacks see where no held-out prompt's reward has changed. It is not logged, but without it EarlyStopping and
# ModelCheckpoint would end the run.
NO_WIN_RATE = {"val/win_rate": 0.5}
ROLLOUT = (
    "rollout/reward_mean",
    "rollout/reward_std",
    "rollout/reward_best",
    "rollout/reward_worst",
    "rollout/truncated",
    "rollout/response_tokens",
    "rollout/finished_share",
    "rollout/pairs",
    "rollout/groups_without_variance",
    "rollout/refilled_prompts",
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


def metric_names(options: RoundOptions, has_reference: bool, held_out: bool, on_groups: bool = False) -> list[str]:
    """Names of the metrics that a run's rounds will have. A name that ends in a slash is a prefix.

    Args:
        options: How rounds are made.
        has_reference: Whether KL to a reference is measured.
        held_out: Whether the run has held-out prompts.
        on_groups: Whether the loss trains on whole groups, without pairs.
    """
    is_greedy = options.val_sampling.temperature == 0
    is_absent = {
        "rollout/old_logp_difference": options.old_logps == "policy",
        "rollout/groups_without_variance": not on_groups,
        "rollout/refilled_prompts": options.refill == 0,
        "val/kl_new_old": is_greedy,
        "val/kl_new_reference": is_greedy or not has_reference,
    }
    absent = {name for name, value in is_absent.items() if value}
    names = [n for n in (*ROLLOUT, *(HELD_OUT if held_out else ())) if n.removesuffix("_se") not in absent]
    names += [f"rollout/penalty/{name}" for name in options.shaping.penalties]
    components = _component_names(options.reward)
    groups = ("rollout", "val") if held_out else ("rollout",)
    return names + [f"{group}/reward/{component}" for group in groups for component in components]


def _component_names(reward: Reward) -> list[str]:
    """Names of a reward's components; an empty name where a reward may have any."""
    if isinstance(reward, CombinedReward):
        named = list(zip(reward.names, reward.parts, strict=True))
        return [*reward.names, *(f"{name}/{inner}" for name, part in named for inner in _component_names(part))]
    is_ours = type(reward).__module__.partition(".")[0] == "rlhf_pl"
    return [] if is_ours and not isinstance(reward, HTTPReward | FunctionReward | StoredReward) else [""]


def held_out_metrics(store: RoundStore, version: int) -> dict[str, float]:
    """Metrics of the policy after `version` rounds on the held-out prompts.

    `val/win_rate` is the share of prompts on which the policy's mean reward exceeds the starting policy's; a tie counts
    half, and where all are ties, as before the first round, there is none: see `NO_WIN_RATE`. `val/reward_gain` is the
    mean difference between the two, and `val/reward_gain_se` its standard error over prompts. `val/kl_new_old` and
    `val/kl_new_reference` estimate KL(new || old) and KL(new || reference) from the policy's responses, and `..._se`
    are their standard errors.
    """
    stored = store.held_out(version)
    responses, rewards = stored.info("responses"), stored.info("rewards")
    now, before = prompt_means(stored), prompt_means(store.held_out(0))
    both = [(now[prompt_id], before[prompt_id]) for prompt_id in now if prompt_id in before]
    gains = [0.0 if is_negligible(new - old, new, old) else new - old for new, old in both]
    mean, wins = sum(gains) / max(1, len(gains)), sum(1.0 if g > 0 else 0.5 if g == 0 else 0.0 for g in gains)
    variance = sum((g - mean) ** 2 for g in gains) / max(1, len(gains) - 1)
    return {
        "val/reward_mean": rewards["mean"],
        **{f"val/reward/{name}": value for name, value in rewards.get("components", {}).items()},
        "val/reward_gain": mean,
        "val/reward_gain_se": math.sqrt(variance / max(1, len(gains))),
        **({"val/win_rate": wins / len(gains)} if any(gains) else {}),
        "val/response_tokens": responses["tokens_mean"],
        "val/finished_share": responses["finished_share"],
        **{f"val/kl_{name}": value for name, value in policy_kl(stored).items()},
        "time/evaluate_s": responses["seconds"] + rewards["seconds"],
    }


def policy_kl(stored: Round) -> dict[str, float]:
    """KL estimates of the policy of an evaluation, as far as they are known: `new_old`, `new_old_se`, ..."""
    return {k: v for k, v in stored.manifest["stages"].get(STAGE, {}).items() if k.startswith("new_")}


def round_metrics(stored: Round) -> dict[str, float]:
    """Metrics of a prepared round."""
    stages = stored.manifest["stages"]
    responses, rewards, pairs = stages["responses"], stages["rewards"], stages["pairs"]
    return {
        "rollout/reward_mean": rewards["mean"],
        "rollout/reward_std": rewards["std"],
        "rollout/reward_best": rewards["best"],
        "rollout/reward_worst": rewards["worst"],
        **{f"rollout/reward/{name}": value for name, value in rewards["components"].items()},
        "rollout/truncated": float(rewards.get("truncated", 0)),
        **{f"rollout/penalty/{name}": pairs["penalties"][name] for name in _penalties(pairs)},
        "rollout/response_tokens": responses["tokens_mean"],
        "rollout/finished_share": responses["finished_share"],
        "rollout/pairs": pairs["pairs"],
        **groups_without_variance(pairs),
        **_refilled_prompts(stored),
        "time/generate_s": responses["seconds"],
        "time/score_s": rewards["seconds"],
        "time/logps_s": stages["logps"]["seconds"],
        **_sampler_difference(stages["logps"]),
    }


def choices(manifest: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that the loss has chosen for a round, such as `eta`, by the names of their metrics."""
    return manifest.get(ENTRY, {}).get("numbers", {})


def training_margins(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How far the policy has followed the reward margins of a round's pairs: see `summarise_margins`."""
    return manifest["stages"].get("training", {}).get("margins", {})


def describe_margins(manifest: Mapping[str, Any]) -> str:
    """What the loss chose for a round, and how far the policy has followed the reward margins; empty if not known."""
    margins = training_margins(manifest)
    parts = [f"{name} {value:.3g} (auto)" for name, value in choices(manifest).items()]
    if "reached" in margins:
        parts.append(f"{margins['reached']:z.0%} of the targets reached")
    elif "slope" in margins:
        parts.append(f"slope {margins['slope']:.3g} nats per reward unit")
    return ", ".join(parts + ([f"R² {margins['r2']:.2f}"] if "r2" in margins else []))


def without_bins(info: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's numbers without the `bins` of its margins, which are for pictures."""
    margins = info.get("margins")
    return {**info, **({"margins": {k: v for k, v in margins.items() if k != "bins"}} if margins else {})}


def sync_metrics(store: RoundStore, index: int) -> dict[str, float]:
    """Metrics of the weight sync before round `index` and before the evaluation that precedes it."""
    return {**store.held_out(index).manifest.get("sync", {}), **store.round(index).manifest.get("sync", {})}


def training_metrics(stored: Round, passes: Callable[[int], float]) -> dict[str, float]:
    """Metrics of a round whose training is complete.

    Args:
        stored: The round.
        passes: Number of prompts with pairs, or of groups -> how many times the training went over them.
    """
    training = stored.info("training")
    pairs = 0.0
    if stored.is_complete("pairs"):
        selected = stored.info("pairs")
        pairs = passes(selected.get("groups", selected["pairs"])) * selected["pairs"]
    return {
        "time/train_s": training["seconds"],
        **({"train/pairs_per_s": pairs / training["seconds"]} if training["seconds"] else {}),  # 0: not known
        **{f"train/round_{name}": training[name] for name in ("loss", "kl") if training.get(name) is not None},
    }


def _refilled_prompts(stored: Round) -> dict[str, float]:
    """Prompts that the round sampled in place of others, where `rollout.refill` is on."""
    is_on = "refill" in stored.manifest.get("settings", {}).get("responses", {})
    return {"rollout/refilled_prompts": float(stored.info("responses").get("refilled", 0))} if is_on else {}


def groups_without_variance(pairs: Mapping[str, Any]) -> dict[str, float]:
    """Share of a round's groups whose shaped rewards are all equal; empty for pairs, and where it is not recorded."""
    equal = pairs.get("equal_rewards")
    return {} if equal is None else {"rollout/groups_without_variance": equal / max(1, pairs["groups"])}


def _sampler_difference(logps: dict[str, Any]) -> dict[str, float]:
    """Difference between the sampler's and the policy's log-probs, nats a token, where the sampler's are used."""
    difference = logps.get("sampler_difference")
    return {} if difference is None else {"rollout/old_logp_difference": difference}


def _penalties(pairs: dict[str, Any]) -> list[str]:
    """Names of the round's penalties, including those that changed no reward."""
    return [name for name in ("missing_eos", "length") if name in pairs.get("penalties", {})]


def prompt_ids(stored: Round) -> list[str]:
    """Ids of the prompts with scored responses, in order."""
    return pc.unique(stored.read("rewards", ["prompt_id"])["prompt_id"]).to_pylist()


def format_reward(reward: float | None) -> str:
    """A reward for tables; a dash for a response without one, whose scoring has failed."""
    return "-" if reward is None else f"{reward:.3f}"


def first_responses(stored: Round, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Row of the first response to each wanted prompt, by prompt id, with `reward` and `question`, the last message."""
    columns = ["prompt_id", "response_index", "prompt", "response"]
    found: dict[str, dict[str, Any]] = {}
    stages = (stored.read_shards("responses", columns), stored.read_shards("rewards", ["reward"]))
    for rows, rewards in zip(*stages, strict=True):
        is_wanted = pc.is_in(rows["prompt_id"], pa.array(wanted, pa.string()))
        table = rows.append_column("reward", rewards["reward"])
        for row in table.filter(pc.and_(is_wanted, pc.equal(rows["response_index"], 0))).to_pylist():
            found[row["prompt_id"]] = row | {"question": message_text(json.loads(row["prompt"])[-1])}
        if len(found) == len(wanted):
            break
    return found
