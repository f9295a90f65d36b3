"""The weighted sum of several rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_pl.rewards.base import Failure, Reward, RewardResult, Sample
from rlhf_pl.rewards.function import FunctionReward
from rlhf_pl.rewards.process_state import SettingsGuard
from rlhf_pl.rewards.results import CallFailed, Outcome, make_failure, score_copies
from rlhf_pl.rewards.time_limit import RewardTimeout
from rlhf_pl.utils.errors import InputError, check_finite


def as_reward(reward: Reward | str | Callable[..., Any]) -> Reward:
    """Wrap a function, or the import path of one, in a `FunctionReward`."""
    return reward if isinstance(reward, Reward) else FunctionReward(reward)


def isolate_functions(reward: Reward) -> None:
    """Run the functions of a reward in separate processes.

    Raises:
        InputError: It has no functions, or one that another process can't import.
    """
    functions = [part for part in getattr(reward, "parts", [reward]) if isinstance(part, FunctionReward)]
    if not functions:
        raise InputError(
            f"`rollout.scoring.isolate` applies to Python functions that are given by their import path; {reward.name} "
            "is not one. Remove it."
        )
    for function in functions:
        function.isolate()


@dataclass
class WeightedReward:
    """A part of a `CombinedReward`.

    Args:
        reward: A `Reward` or a Python function, in a config by its import path.
        weight: Factor of its score; negative for a penalty.
        name: Its name in logs; null for the name of its class or function.
    """

    reward: Reward | str
    weight: float = 1.0
    name: str | None = None


class CombinedReward(Reward):
    """The weighted sum of several rewards. The score of each is logged as a component under its name.

    If one of them fails for a response, the response has no reward.

    Args:
        rewards: The parts.
    """

    def __init__(self, rewards: list[WeightedReward]) -> None:
        if not rewards:
            raise InputError("`rollout.reward.rewards` is empty; name at least one reward.")
        for part in rewards:
            check_finite("rollout.reward.rewards", weight=part.weight)
        self.parts = [as_reward(part.reward) for part in rewards]
        self.weights = [float(part.weight) for part in rewards]
        self.names = [part.name or _short_name(reward.name) for part, reward in zip(rewards, self.parts, strict=True)]
        if len(set(self.names)) < len(self.names):
            raise InputError(
                f"`rollout.reward.rewards`: two parts have the same name: {', '.join(self.names)}. Give each a `name`."
            )

    @property
    def name(self) -> str:
        return " + ".join(f"{weight:g} {name}" for weight, name in zip(self.weights, self.names, strict=True))

    def fingerprint(self) -> str:
        parts = zip(self.names, self.weights, self.parts, strict=True)
        return "CombinedReward(" + ", ".join(f"{n}: {w!r} * {p.fingerprint()}" for n, w, p in parts) + ")"

    def check(self, samples: Sequence[Sample]) -> None:
        for part in self.parts:
            part.check(samples)

    @property
    def by_prompt(self) -> bool:
        return any(part.by_prompt for part in self.parts)

    @property
    def one_by_one(self) -> bool:
        return all(part.one_by_one for part in self.parts)

    @property
    def is_remote(self) -> bool:
        return all(part.is_remote for part in self.parts)

    @property
    def limits_itself(self) -> bool:
        return all(part.limits_itself for part in self.parts)

    def score(self, batch: Sequence[Sample]) -> list[Outcome]:
        scored = [_score_part(part, name, batch) for name, part in zip(self.names, self.parts, strict=True)]
        return [self._sum(results) for results in zip(*scored, strict=True)]

    def _sum(self, results: Sequence[Outcome]) -> Outcome:
        total, components, truncated = 0.0, {}, 0
        for name, weight, result in zip(self.names, self.weights, results, strict=True):
            if isinstance(result, Failure):
                return Failure(result.kind, f"{name}: {result.detail}", result.final)
            total += weight * result.reward
            components[name] = result.reward
            components |= {f"{name}/{part}": value for part, value in result.components.items()}
            truncated = max(truncated, result.truncated_tokens)
        return RewardResult(total, components, truncated)

    def open(self) -> None:
        for part in self.parts:
            part.open()

    def release_gpu(self) -> None:
        for part in self.parts:
            part.release_gpu()

    def close(self) -> None:
        for part in self.parts:
            part.close()


def _score_part(part: Reward, name: str, batch: Sequence[Sample]) -> list[Outcome]:
    """Score a batch with a part; the failure of a call names the part."""
    try:
        with SettingsGuard():
            return score_copies(part, batch)
    except RewardTimeout:
        raise
    except BaseException as error:  # users' code may raise anything
        failure = make_failure(error)
        raise CallFailed(replace(failure, detail=f"`{name}`: {failure.detail}")) from error


def _short_name(name: str) -> str:
    """`package.module.function` as `function`; a class without its arguments."""
    return name.partition("(")[0].rpartition(":")[2].rpartition(".")[2]
