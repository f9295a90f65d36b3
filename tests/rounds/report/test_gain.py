"""A gain is claimed only where it is more than noise."""

import random

import pytest

from rlhf_pl.rounds.report.gain import Gain, describe_gain, t_quantile


@pytest.mark.parametrize(("degrees", "expected"), [(5, 2.571), (7, 2.365), (15, 2.131), (63, 1.998)])
def test_quantiles_of_students_t(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=0.005)


def test_a_large_gain_on_four_prompts_is_no_proof() -> None:
    text = describe_gain(Gain([0, 0.1, 0, 0.1], [1, 1, 0.9, 1], 4))
    assert "too few" in text
    assert "`data.val_prompts` (now 4)" in text
    assert "standard errors" not in text


def test_two_standard_errors_on_eight_prompts_are_noise() -> None:
    """The t quantile of 7 degrees of freedom is 2.36; the gains have mean 0.17 and standard error 0.0787."""
    gains = [0.0, 0.0, 0.6, 0.3, 0.0, 0.46, 0.0, 0.0]
    text = describe_gain(Gain([0.2] * 8, [0.2 + g for g in gains], 8))
    assert "within noise" in text
    assert "wins" not in text


def test_a_clear_gain_is_claimed_with_wins_and_ties() -> None:
    text = describe_gain(Gain([0.0] * 20, [0.5 + i / 100 for i in range(19)] + [0.0], 20), kl=0.5)
    assert "standard errors. The new policy wins on 19 of 20 prompts and loses on 0, 1 is a tie." in text


def test_a_policy_that_stood_still_has_gained_nothing() -> None:
    source = random.Random(0)
    before = [source.random() for _ in range(64)]
    text = describe_gain(Gain(before, [b + 0.2 + source.random() / 10 for b in before], 64), kl=1e-4)
    assert "The policy hardly changed" in text
    assert "sampling noise" in text
    assert "wins" not in text


def test_equal_rewards_give_no_win_rate_and_no_error() -> None:
    assert "nothing to compare" in describe_gain(Gain([0.5] * 8, [0.5] * 8, 8))
    assert "+1.000 on each of 8 prompts" in describe_gain(Gain([0.0] * 8, [1.0] * 8, 8))


@pytest.mark.parametrize("scale", [1e6, -1e6, 1e-6])
def test_numbers_are_shown_at_their_scale(scale: float) -> None:
    text = describe_gain(Gain([scale] * 8, [scale * (1 + (4 + i) / 100) for i in range(8)], 8))
    assert "standard errors" in text
    assert "± 0.000," not in text


def test_missing_rewards_are_counted() -> None:
    assert "(on the 7 of 9 prompts with a reward in both)" in describe_gain(Gain([0.0] * 7, [1.0] * 7, 9))
    assert "nothing to compare" in describe_gain(Gain([], [], 9))
