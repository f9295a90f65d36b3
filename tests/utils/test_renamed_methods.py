"""Users' rewards and samplers that define methods under earlier names."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from rlhf_pl.rewards import Reward, RewardResult, Sample
from rlhf_pl.rollout.base import Sampler


class ConstantReward(Reward):
    def score(self, batch: Sequence[Sample]) -> list[RewardResult]:
        return [RewardResult(1.0) for _ in batch]


class Rests:
    def rest(self) -> str:
        return "earlier"


def test_an_earlier_method_overrides_the_renamed_one_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    class Earlier(Rests, ConstantReward):
        pass

    class Derived(Earlier):
        pass

    assert Earlier().release_gpu() == Derived().release_gpu() == "earlier"
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: tests.utils.test_renamed_methods.")
    assert "Earlier: `rest` is now `release_gpu`" in line


def test_both_methods_of_a_sampler_share_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    class Earlier(Sampler):
        def forget(self, tensors: Mapping[str, Tensor]) -> None:
            raise KeyError

        def held_weights(self) -> Iterator[tuple[str, Tensor]]:
            raise ValueError

    assert vars(Earlier)["invalidate_weights"] is Earlier.forget
    assert vars(Earlier)["readable_weights"] is Earlier.held_weights
    (line,) = capsys.readouterr().out.splitlines()
    assert "`forget` is now `invalidate_weights`, `held_weights` is now `readable_weights`." in line


def test_new_names_take_precedence_without_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    class Both(Rests, ConstantReward):
        def release_gpu(self) -> Any:
            return "new"

    class Setting(ConstantReward):
        rest = 3

    assert Both().release_gpu() == "new"
    assert Setting().release_gpu() is None
    assert capsys.readouterr().out == ""
