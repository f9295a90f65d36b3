"""Options of policy gradients without effect or sense are refused by the command before anything is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_pl import KLTerm
from rlhf_pl.algorithms.reward_shaping import RewardShaping, shape_rewards
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.algorithms.trained_round import logged

REFUSED = {
    "GRPOLoss --model.loss.kl.coef 0.1 --model.loss.kl.estimator k1": "whose gradient is 0 in expectation in a loss",
    "GRPOLoss --model.reference other": "`model.loss` GRPOLoss reads no reference log-probs",
    "GRPOLoss --rollout.selector AllPairs": "trains on all responses of a prompt, so no pairs are selected",
    "GRPOLoss --rollout.shaping.normalize round": "the advantages of `model.loss` GRPOLoss are normalised anyway",
    "ReinforcePlusPlusLoss --rollout.shaping.normalize round": "ReinforcePlusPlusLoss are normalised anyway",
    "GRPOLoss --model.loss.constant_tokens 32": "with `constant`, and with it alone",
    "DrGRPOLoss --model.loss.constant_tokens 0": "`model.loss.constant_tokens` must be positive",
    "GSPOLoss --model.loss.clip_low 1.5": "`model.loss.clip_low` must be at most 1",
    "RLOOLoss --rollout.sampling.num_responses 1": "it must be 2 or more",
    "ReinforcePlusPlusLoss --rollout.sampling.num_responses 1 --rollout.refill 1 --data.prompts_per_round 3": (
        "no prompt lacks anything"
    ),
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_has_no_effect_is_refused(
    fit: Callable[..., int], capsys: pytest.CaptureFixture[str], options: str
) -> None:
    assert fit("--model.loss", *options.split()) == 1
    error = capsys.readouterr().err
    assert REFUSED[options] in " ".join(error.split())
    assert error.count("error: ") == 1
    assert not Path("run").exists()


def test_values_out_of_range_are_refused() -> None:
    for coef in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="must be positive and finite"):
            KLTerm(coef)


def test_soft_overlong_punishment_is_dapos() -> None:
    """DAPO, Eq. 13, with L_max = 20 and L_cache = 4: 0 up to 16 tokens, (16 - length) / 4 above, -1 at 20.

    That is `length_penalty` 1 / L_cache and `length_free_tokens` L_max - L_cache, with `max_response_tokens` L_max.
    """
    lengths = [3, 16, 17, 19, 20]
    shaping = RewardShaping(length_penalty=1 / 4, length_free_tokens=16)
    (found,), _ = shape_rewards([[0.0] * 5], [lengths], [[True] * 5], shaping)
    assert found == [0, 0, -0.25, -0.75, -1]


def test_refilled_groups_all_have_variance(fit: Callable[..., int]) -> None:
    """A reward of 0 or 1 leaves many groups of two without variance; others take their place."""
    Path("rare_reward.py").write_text("def score(response):\n    return float(sum(map(ord, response)) % 5 == 0)\n")
    options = "--model.loss DAPOLoss --rollout.sampling.num_responses 2 --data.prompts_per_round 3 --rollout.refill 4"
    assert fit(*options.split(), "--rollout.reward", "rare_reward.score") == 0
    stored = RoundStore("run").round(0)
    assert stored.info("responses")["refilled"] > 0
    rewards = torch.tensor(stored.read("pairs")["reward"].to_pylist()).view(-1, 2)
    assert (rewards[:, 0] != rewards[:, 1]).all()
    assert logged("train/groups_without_variance") == [0.0] * len(logged("train/loss"))


def test_a_round_without_usable_prompts_makes_no_update(fit: Callable[..., int]) -> None:
    """The reward fails for all but one response to each prompt."""
    Path("scarce_reward.py").write_text(
        "seen = {}\n\n"
        "def score(prompt, response):\n"
        "    return 1.0 if seen.setdefault(prompt, response) == response else float('nan')\n"
    )
    scoring = "--rollout.reward scarce_reward.score --rollout.scoring.on_failure drop --rollout.scoring.retries 0"
    assert fit("--model.loss", "GRPOLoss", *scoring.split()) == 0
    assert logged("train/loss") == []
    assert Path("run/model/model.safetensors").exists()


def test_an_update_of_masked_responses_alone_has_no_loss(fit: Callable[..., int]) -> None:
    """No response of four tokens is finished: metrics of counted ones are left out, rather than NaN."""
    options = "DAPOLoss --model.loss.truncated mask --rollout.sampling.max_response_tokens 4"
    assert fit("--model.loss", *options.split()) == 0
    assert not RoundStore("run").round(0).read("responses")["finished"].to_numpy().any()
    assert logged("train/loss") == logged("train/ess") == logged("train/clip_high") == []
    assert len(logged("train/entropy")) == 2  # updates
