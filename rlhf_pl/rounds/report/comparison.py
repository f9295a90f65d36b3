"""Two runs compared by the rewards of the held-out prompts that they share, and what that shows."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_pl.data.held_out import prompt_key
from rlhf_pl.rounds.report.gain import FEWEST, Gain
from rlhf_pl.rounds.report.numbers import decimals_for
from rlhf_pl.rounds.stages import prompt_means
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.errors import InputError

_Key = str | tuple[str, str]


@dataclass(frozen=True)
class Evaluation:
    """A run's evaluation after some rounds.

    Args:
        name: The run, as the user names it.
        store: Its rounds.
        version: Rounds that the policy has trained on.
    """

    name: str
    store: RoundStore
    version: int

    @property
    def stored(self) -> Round:
        return self.store.held_out(self.version)


def find_evaluation(name: str, after: int | None = None) -> Evaluation:
    """A run's evaluation after `after` rounds, or its last complete one.

    Raises:
        InputError: There is none.
    """
    store = RoundStore(name)
    if not store.run_dir.is_dir():
        raise InputError(f"There is no folder {name!r}.")
    complete = [version for version, stored in store.evaluations().items() if stored.is_complete("rewards")]
    if not complete:
        raise InputError(
            f"{name!r} holds no evaluation on held-out prompts: it is not a run directory, its run has not come that "
            "far, or it had no `data.val_prompts`."
        )
    if after is not None and after not in complete:
        known = ", ".join(map(str, complete))
        raise InputError(f"{name!r} holds no evaluation after {after} rounds (--after). It has those after: {known}.")
    return Evaluation(name, store, complete[-1] if after is None else after)


def compare(first: Evaluation, second: Evaluation) -> Gain:
    """Mean rewards of the prompts that both evaluations share: `before` of the first run, `after` of the second.

    Prompts are the same if their messages are, whatever their ids; ids tell those apart that a run has several times.
    """
    texts = [_prompt_texts(evaluation.stored) for evaluation in (first, second)]
    repeated = {text for found in texts for text, count in Counter(found.values()).items() if count > 1}
    means: list[dict[_Key, float]] = [
        {(text, prompt_id) if (text := found[prompt_id]) in repeated else text: mean
         for prompt_id, mean in prompt_means(evaluation.stored).items()}
        for evaluation, found in zip((first, second), texts, strict=True)
    ]  # fmt: skip
    both = [key for key in means[0] if key in means[1]]
    return Gain([means[0][key] for key in both], [means[1][key] for key in both], len(both))


def _prompt_texts(stored: Round) -> dict[str, str]:
    """The messages of each prompt as text, by prompt id."""
    found: dict[str, str] = {}
    for table in stored.read_shards("responses", ["prompt_id", "prompt"]):
        unique = table.group_by("prompt_id", use_threads=False).aggregate([("prompt", "first")])
        for row in unique.to_pylist():
            found[row["prompt_id"]] = prompt_key(json.loads(row["prompt_first"]))
    return found


def describe_difference(difference: Gain, first: str, second: str) -> str:
    """The second run's mean reward minus the first one's, and what it shows: a claim only where it is more than noise.

    Args:
        difference: From `compare`.
        first: Name of the first run.
        second: Name of the second run.
    """
    count = len(difference.before)
    if count == 0:
        return (
            "The runs share no held-out prompt with a reward in both, so they can't be compared. Give both the same "
            "file in `data.val_prompts`, or the same data and `seed_everything`."
        )
    prompts = "the prompt" if count == 1 else f"the {count} prompts"
    text = f"{second} minus {first}, on {prompts} that both have: "
    if not any(difference.gains):
        return f"{text}no difference on any."
    mean, error = difference.mean, difference.error
    digits = decimals_for(error or abs(mean))
    shown = f"{mean:+.{digits}f}" + (f" ± {error:.{digits}f}" if error > 0 else "")
    if count < FEWEST:
        return f"{text}{shown}. Too few prompts to tell a difference from chance: 64 or more in `data.val_prompts`."
    if error == 0:
        return f"{text}{shown} on each."
    if abs(mean) < difference.noise:
        return (
            f"{text}{shown}, within noise. These prompts can tell a difference of {difference.noise:.{digits}f} or "
            "more: for smaller ones more of them, `data.val_prompts`."
        )
    better, worse = sum(gain > 0 for gain in difference.gains), sum(gain < 0 for gain in difference.gains)
    return (
        f"{text}{shown}, {abs(mean) / error:.1f} standard errors. {second} is better on {better}, worse on {worse}, "
        f"equal on {count - better - worse}."
    )


def describe_own_gain(gain: Gain) -> str:
    """A run's gain over its own start, in short."""
    if not gain.before:
        return "not known"
    digits = decimals_for(gain.error or abs(gain.mean))
    text = f"{gain.mean:+.{digits}f}" + (f" ± {gain.error:.{digits}f}" if gain.error > 0 else "")
    if len(gain.before) < FEWEST:
        return f"{text} (too few prompts)"
    return f"{text} (within noise)" if abs(gain.mean) < gain.noise else text


def describe_unlike(first: Evaluation, second: Evaluation) -> list[str]:
    """What differs in how two evaluations were made, so that it is a part of their difference; a sentence each."""
    one, other = (evaluation.stored.manifest for evaluation in (first, second))
    found = []
    rewards = [_setting(manifest, "rewards", "reward") for manifest in (one, other)]
    names = [manifest["stages"]["rewards"].get("reward") for manifest in (one, other)]
    if names[0] != names[1]:
        found.append(
            f"the rewards are {names[0]} and {names[1]}: numbers of different rewards can't be compared, so the "
            "difference says nothing"
        )
    elif rewards[0] != rewards[1]:
        found.append(f"the code or the settings of the reward {names[0]} differ")
    samplings = [manifest["stages"]["responses"].get("sampling", {}) for manifest in (one, other)]
    for name in ("temperature", "top_p", "top_k", "min_p", "max_response_tokens"):
        values = [sampling.get(name) for sampling in samplings]
        if values[0] != values[1]:
            found.append(f"responses were sampled with {name} {values[0]} and {values[1]}")
    if first.version != second.version:
        found.append(f"they have trained for {first.version} and {second.version} rounds")
    policies = [_setting(manifest, "responses", "policy") for manifest in (one, other)]
    if policies[0] != policies[1]:
        found.append(f"they start from {policies[0]} and {policies[1]}")
    return found


def have_one_reward(first: Evaluation, second: Evaluation) -> bool:
    """Whether the rewards of two evaluations are numbers of the same reward, as far as its name tells."""
    names = [evaluation.stored.info("rewards").get("reward") for evaluation in (first, second)]
    return names[0] == names[1]


def _setting(manifest: Mapping[str, Any], stage: str, name: str) -> Any:
    return manifest.get("settings", {}).get(stage, {}).get(name)
