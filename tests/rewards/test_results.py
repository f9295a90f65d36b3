"""Which return values are scores."""

import math
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_pl.rewards import CombinedReward, Failure, FunctionReward, Reward, RewardResult, Sample, ScoringConfig
from rlhf_pl.rewards import WeightedReward as Part
from rlhf_pl.rewards.guard import score_samples
from rlhf_pl.utils.errors import InputError

DROP = ScoringConfig(retries=0, backoff_s=0, on_failure="drop")
STOP = ScoringConfig(retries=0, backoff_s=0)
TWO = [Sample(f"p{i}", [{"role": "user", "content": "?"}], f"response {i}") for i in range(2)]


class BadFloat(float):
    def __float__(self) -> Any:
        return "3"


class WithoutText:
    def __repr__(self) -> str:
        raise RuntimeError


def score_batch(value: Any) -> list[Any]:
    """The rewards or kinds of failure of a batched function that returns `value`."""
    found = score_samples(FunctionReward(lambda responses: value), TWO, DROP)
    return [o.kind if isinstance(o, Failure) else o.reward for o in found]


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 2],
        (0.5, 2),
        deque([0.5, 2]),
        array("d", [0.5, 2]),
        np.array([0.5, 2]),
        np.array([0.5, 2], dtype=np.float16),
        np.array([0.5, 2], dtype=object),
        torch.tensor([0.5, 2.0]),
        torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
        torch.tensor([0.5, 2.0], requires_grad=True),
        pd.Series([0.5, 2], index=[7, 3]),
        np.array([[0.5], [2.0]]),
        torch.tensor([[0.5], [2.0]]),
        [torch.tensor([0.5]), np.array([[2.0]])],
        [np.float32(0.5), torch.tensor(2.0)],
        [np.array(0.5), Fraction(2)],
        [Decimal("0.5"), np.int64(2)],
    ],
    ids=lambda v: type(v).__name__,
)
def test_sequences_and_arrays_of_numbers_are_scores(values: Any) -> None:
    assert score_batch(values) == [0.5, 2.0]


def test_true_is_1_and_false_is_0() -> None:
    for values in ([True, False], np.array([True, False]), torch.tensor([True, False]), [np.True_, np.False_]):
        assert score_batch(values) == [1.0, 0.0]


@pytest.mark.parametrize(
    "values",
    [
        {0: 0.5, 1: 2.0},
        OrderedDict(a=1.0, b=2.0),
        {0.5, 2.0},
        frozenset({0.5, 2.0}),
        {0: 0.5, 1: 2.0}.values(),
        "12",
        b"12",
        bytearray(b"12"),
        memoryview(b"12"),
        (x for x in [0.5, 2.0]),
        map(float, [0.5, 2.0]),
        iter(lambda: 1.0, None),
        np.array(0.5),
        np.array([0.5, 2.0], dtype=complex),
        np.array(["2020", "2021"], dtype="datetime64[ns]"),
        np.array([b"1", b"2"]),
        np.array([[0.5, 2.0]]),
        torch.zeros(2, 2),
        pd.DataFrame({"a": [0.5, 2.0]}),
        None,
        0.5,
        WithoutText(),
        list,
        np.ndarray,
    ],
    ids=lambda v: type(v).__name__,
)
def test_other_types_are_not_a_batch_of_scores(values: Any) -> None:
    assert score_batch(values) == ["wrong_type"] * 2
    with pytest.raises(InputError, match=r"^Reward `test_.*<lambda>` failed .* returned "):
        score_samples(FunctionReward(lambda responses: values), TWO, STOP)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("0.5", "exception"),
        (b"1", "exception"),
        (None, "refused"),
        ([0.5], "exception"),
        ({"reward": 0.5}, "exception"),
        (1 + 0j, "exception"),
        (np.complex64(1), "exception"),
        (np.str_("0.5"), "exception"),
        (np.datetime64("2020"), "exception"),
        (np.array([0.5, 0.5]), "exception"),
        (torch.tensor([0.5, 0.5]), "exception"),
        (pd.NA, "exception"),
        (pd.NaT, "exception"),
        (BadFloat(0.5), "exception"),
        (WithoutText(), "exception"),
        (10**400, "not_finite"),
        (10**5000, "not_finite"),
        (Fraction(10**400), "not_finite"),
        (Decimal("1e400"), "not_finite"),
        (Decimal("sNaN"), "exception"),
        (np.float32("nan"), "not_finite"),
        (torch.tensor(math.inf), "not_finite"),
        (RewardResult(None), "refused"),  # type: ignore[arg-type]
        (RewardResult(1.0, None), "exception"),  # type: ignore[arg-type]
        (RewardResult(1.0, {"part": None}), "exception"),  # type: ignore[dict-item]
        (RewardResult(1.0, {"part": "0.5"}), "exception"),  # type: ignore[dict-item]
        (RewardResult(1.0, {"part": 10**400}), "not_finite"),
        (RewardResult(1.0, [0.5]), "exception"),  # type: ignore[arg-type]
        (RewardResult(1.0, {}, -1), "exception"),
        (RewardResult(1.0, {}, None), "exception"),  # type: ignore[arg-type]
    ],
    ids=lambda v: f"{type(v).__name__}",
)
def test_a_value_that_is_not_a_finite_number_is_a_failure_of_its_response_alone(value: Any, kind: str) -> None:
    def one(response: str) -> Any:
        return value if response == "response 1" else 0.5

    def many(responses: list[str]) -> list[Any]:
        return [one(response) for response in responses]

    for function in (one, many):
        found = score_samples(FunctionReward(function), TWO, DROP)
        assert [o.kind if isinstance(o, Failure) else o.reward for o in found] == [0.5, kind]
        with pytest.raises(InputError, match=rf"{function.__name__}` failed for prompt_id 'p1'.*returned ") as error:
            score_samples(FunctionReward(function), TWO, STOP)
        assert len(str(error.value)) < 900


def test_components_are_copied_when_the_function_returns() -> None:
    parts = {"length": 1.0}

    def reward(response: str) -> RewardResult:
        parts["length"] += 1
        return RewardResult(1.0, parts)

    first, second = score_samples(FunctionReward(reward), TWO, DROP)
    assert (first.components, second.components) == ({"length": 2.0}, {"length": 3.0})  # type: ignore[union-attr]


async def score_async(response: str) -> float:
    return 1.0


def yield_scores(responses: list[str]) -> Any:
    yield from (1.0 for _ in responses)


@pytest.mark.parametrize("function", [score_async, yield_scores])
def test_a_function_that_does_not_return_its_scores_is_an_error(function: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=f"`{function.__name__}` is an `async` function or a generator"):
        FunctionReward(function)
    with pytest.raises(InputError, match=r"coroutine.*asyncio\.run"):
        score_samples(FunctionReward(lambda response: score_async(response)), TWO, STOP)


def test_the_failing_part_is_named() -> None:
    """Also if it is a class that returns plain numbers, or too few."""

    class ConstantReward(Reward):
        def __init__(self, *values: Any) -> None:
            self.values = values

        def score(self, batch: Sequence[Sample]) -> Any:
            return list(self.values)

    def combine(*values: Any) -> CombinedReward:
        return CombinedReward([Part(ConstantReward(1.0, 2.0), 2.0, "good"), Part(ConstantReward(*values), -1.0, "bad")])

    assert [o.reward for o in score_samples(combine(0.5, 1.0), TWO, STOP)] == [1.5, 3.0]  # type: ignore[union-attr]
    for values, message in {(0.5,): "`bad`: returned 1 scores for 2", (1.0, None): "bad: returned None"}.items():
        with pytest.raises(InputError, match=message):
            score_samples(combine(*values), TWO, STOP)
