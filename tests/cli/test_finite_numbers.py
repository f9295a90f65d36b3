"""NaN and infinity are refused as options, arguments and rewards."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from rlhf_pl import RebelLoss, RebelModule, RewardModelModule, SamplingConfig
from rlhf_pl.algorithms.pair_selection import BestWorst
from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.callbacks import DegenerationGuard, RoundRefresh
from rlhf_pl.cli.option_numbers import refuse_not_finite
from rlhf_pl.data.preferences import read_number
from rlhf_pl.models.lora import LoRA
from rlhf_pl.optim import AdamW
from rlhf_pl.rewards import (
    CombinedReward,
    HTTPReward,
    RewardResult,
    Sample,
    ScoringConfig,
    WeightedReward,
    as_reward,
)
from rlhf_pl.rewards.guard import score_samples
from rlhf_pl.utils.errors import InputError

MAKERS: dict[str, Callable[[float], Any]] = {
    "eta": RebelLoss,
    "kl_coef": lambda value: RebelModule("x", kl_coef=value),
    "centering": lambda value: RewardModelModule("x", centering=value),
    "temperature": lambda value: SamplingConfig(temperature=value),
    "missing_eos_reward": lambda value: RewardShaping(missing_eos_reward=value),
    "length_penalty": lambda value: RewardShaping(length_penalty=value),
    "min_margin": BestWorst,
    "timeout_minutes": lambda value: RoundRefresh(timeout_minutes=value),
    "weight": lambda value: CombinedReward([WeightedReward("x.y", value)]),
    "on_failure": lambda value: ScoringConfig(on_failure=value),
    "alpha": lambda value: LoRA(alpha=value),
    "lr": lambda value: AdamW([torch.nn.Parameter(torch.zeros(1))], lr=value),
    "timeout_s": lambda value: HTTPReward("http://localhost", timeout_s=value),
}


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_arguments_are_finite(name: str, value: float) -> None:
    with pytest.raises(InputError, match=name):
        MAKERS[name](value)


def test_infinity_means_no_limit_for_documented_options() -> None:
    DegenerationGuard(max_kl=math.inf, max_length_ratio=math.inf)
    refuse_not_finite(Namespace(guards=Namespace(max_kl=math.inf, max_length_ratio=math.inf)))
    refuse_not_finite({"reward": _chosen("mine.Reward", cap=math.inf, part={"x": [math.inf]})})
    for wrong in (
        Namespace(guards=Namespace(max_kl=-math.inf)),
        Namespace(guards=Namespace(min_reward_std=math.inf)),
        {"reward": _chosen("mine.Reward", cap=math.nan)},
        {"model": {"optimizer": _chosen("mine.SGD", lr=math.inf)}},
        {"model": _chosen("mine.Module", loss=_chosen("rlhf_pl.RebelLoss", eta=math.inf))},
    ):
        with pytest.raises(InputError, match="must be a finite number"):
            refuse_not_finite(wrong)


def _chosen(path: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def test_the_largest_reward_is_a_reward() -> None:
    """With an eta of 1e6 the loss of the widest margin is (1e6 * 2e12)^2 = 4e36, below float32's 3.4e38."""
    scores = {"1e12": True, "-1e12": True, "1.1e12": False, "-inf": False, "nan": False}
    samples = [Sample("p", [{"role": "user", "content": "?"}], text) for text in scores]
    found = score_samples(as_reward(_as_number), samples, ScoringConfig(retries=0, on_failure="drop"))
    assert [isinstance(outcome, RewardResult) for outcome in found] == list(scores.values())
    widest = RebelLoss(1e6)(torch.zeros(1), torch.zeros(1), torch.tensor([1e12]) - torch.tensor([-1e12]))
    assert widest.item() == pytest.approx(4e36)
    with pytest.raises(InputError, match=r"`margin` is '1.1e12'; expected a number of absolute value at most 1e[+]12"):
        read_number({"margin": "1.1e12"}, "margin", 0.0)


def _as_number(response: str) -> float:
    return float(response)
