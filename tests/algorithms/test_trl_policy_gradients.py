"""Loss and gradient of policy gradients equal those of TRL's trainers on the responses of a stored round.

TRL 1.16 in float32 on the CPU, in one batch of the whole round, without vLLM: `temperature` 0.9, `num_generations` 4,
`num_iterations` 2 (so that it computes the log-probs of pi_old), `gradient_accumulation_steps` 1,
`max_completion_length` 32, `epsilon` and `epsilon_high` as ours (CISPO's `epsilon_high` is 1 more), and the settings
named in each case. It gets the tokens of our round in place of responses of its own, and their rewards; the log-probs
of pi_old and of the reference, the advantages and the loss are its own, by `_generate_and_score_completions` and
`_compute_loss`.

Our side is the real command: a round of 7 prompts with 4 responses each, 1 to 32 tokens long, some of them truncated,
and two updates over all of it. The first is on-policy; for the second, where the policy has moved from pi_old, TRL's
model gets our weights. Micro-batches are of 2, 2, 2 and 1 groups, or of at most 60 tokens, which splits most groups.

Differences:
- RLOO with truncated responses masked is not compared: TRL's loss of a masked response is minus its advantage, without
  gradient, and its KL penalty is left out; ours is a loss of 0, with the penalty.
- TRL's advantages of equal rewards are rounding errors divided by 1e-4; ours are exactly 0.
- TRL's metric `kl` is multiplied by the ratio only where the term in the loss is; ours always is.
- TRL's `entropy` is that of the whole distribution; ours is the mean of -log pi over the sampled tokens.
- TRL's clip shares of GSPO count masked responses, as not clipped; ours leave them out.
- TRL has no counterpart of `GRPOLoss` with `aggregation: constant` and other advantages than Dr. GRPO's but
  `scale_rewards`: group.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.algorithms.trained_round import TEMPERATURE, Group, logged, logged_losses, stored_prompts
from tests.algorithms.update_recorder import UpdateRecorder
from tests.conftest import save_llama

pytest.importorskip("trl")
KL_COEF = 0.3


@dataclass
class Case:
    """Options of our command, and the settings of TRL that they stand for."""

    ours: str
    theirs: dict[str, Any] = field(default_factory=dict)
    trainer: str = "GRPO"
    clips: str = "clip_ratio/low_mean clip_ratio/high_mean"

    @property
    def has_kl(self) -> bool:
        return "beta" in self.theirs


CLIP, CLIP_SETTINGS = "--model.loss.clip_low 0.02 --model.loss.clip_high 0.04", {"epsilon": 0.02, "epsilon_high": 0.04}
KL, KL_SETTINGS = f"--model.loss.kl.coef {KL_COEF}", {"beta": KL_COEF, "use_bias_correction_kl": True}
PLAIN_KL = f"{KL} --model.loss.kl.by_ratio false"
PLAIN_KL_SETTINGS = {"beta": KL_COEF, "use_bias_correction_kl": False}
MASK, MASK_SETTINGS = "--model.loss.truncated mask", {"mask_truncated_completions": True}
SPLIT = "--data.max_tokens_per_batch 60"
GRPO = {"loss_type": "grpo", "scale_rewards": "group"}
DR_GRPO = {"loss_type": "dr_grpo", "scale_rewards": "none"}
GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
CASES = {
    "RLOO": Case(f"RLOOLoss {CLIP}", CLIP_SETTINGS, "RLOO"),
    "RLOO, KL in the reward": Case(
        f"RLOOLoss {CLIP} --model.kl_coef {KL_COEF} {SPLIT}", {"beta": KL_COEF} | CLIP_SETTINGS, "RLOO"
    ),
    "GRPO": Case(f"GRPOLoss {CLIP}", GRPO | CLIP_SETTINGS),
    "GRPO, k3, split groups": Case(f"GRPOLoss {CLIP} {KL} {SPLIT}", GRPO | CLIP_SETTINGS | KL_SETTINGS),
    "GRPO, k3 of the paper": Case(f"GRPOLoss {CLIP} {PLAIN_KL}", GRPO | CLIP_SETTINGS | PLAIN_KL_SETTINGS),
    "GRPO, masked, split groups": Case(f"GRPOLoss {CLIP} {MASK} {SPLIT}", GRPO | CLIP_SETTINGS | MASK_SETTINGS),
    "GRPO, constant": Case(
        f"GRPOLoss {CLIP} --model.loss.aggregation constant --model.loss.constant_tokens 32",
        DR_GRPO | CLIP_SETTINGS | {"scale_rewards": "group"},
    ),
    "Dr. GRPO": Case(
        f"DrGRPOLoss --model.loss.constant_tokens 32 {CLIP} {MASK}", DR_GRPO | CLIP_SETTINGS | MASK_SETTINGS
    ),
    "Dr. GRPO, k3, split groups": Case(
        f"DrGRPOLoss --model.loss.constant_tokens 32 {CLIP} {KL} {SPLIT}", DR_GRPO | CLIP_SETTINGS | KL_SETTINGS
    ),
    "DAPO, masked, split groups": Case(
        f"DAPOLoss {CLIP} {MASK} {SPLIT}", {"loss_type": "dapo"} | CLIP_SETTINGS | MASK_SETTINGS
    ),
    "DAPO, k3": Case(f"DAPOLoss {CLIP} {KL}", {"loss_type": "dapo"} | CLIP_SETTINGS | KL_SETTINGS),
    "GSPO": Case(f"GSPOLoss {CLIP}", GSPO | CLIP_SETTINGS),
    "GSPO, masked": Case(f"GSPOLoss {CLIP} {MASK}", GSPO | CLIP_SETTINGS | MASK_SETTINGS, clips=""),
    "GSPO, k3, split groups": Case(f"GSPOLoss {CLIP} {KL} {SPLIT}", GSPO | CLIP_SETTINGS | KL_SETTINGS),
    "CISPO, masked, k3 of the paper, split groups": Case(
        f"CISPOLoss --model.loss.clip_high 0.04 {MASK} {PLAIN_KL} {SPLIT}",
        {"loss_type": "cispo", "epsilon_high": 1.04} | MASK_SETTINGS | PLAIN_KL_SETTINGS,
        clips="cispo_clip_ratio",
    ),
    "CISPO, k3": Case(
        f"CISPOLoss --model.loss.clip_high 0.04 {KL}",
        {"loss_type": "cispo", "epsilon_high": 1.04} | KL_SETTINGS,
        clips="cispo_clip_ratio",
    ),
}
# one of each loss, aggregation, KL term and division; the others take as long
ALWAYS = (
    "RLOO, KL in the reward",
    "GRPO, k3, split groups",
    "Dr. GRPO",
    "DAPO, masked, split groups",
    "GSPO",
    "CISPO, masked, k3 of the paper, split groups",
)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference."""
    return save_llama(tmp_path_factory.mktemp("reference") / "other", seed=1)


def make_trainer(case: Case, policy: Path, other: Path, groups: list[Group]) -> Any:
    """TRL's trainer on the tokens and rewards of the round, with the weights of pi_old."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [row for group in groups for row in group]

    class Trainer(getattr(trl, f"{case.trainer}Trainer")):  # type: ignore[misc]
        """Takes the responses of the round in place of its own."""

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [row["prompt_tokens"] for row in rows], None, {}

        def _generate_single_turn(self, *_: Any) -> Any:
            responses = [row["response_tokens"] for row in rows]
            return responses if case.trainer == "RLOO" else (responses, None)

    def reward(prompts: Any, **_: Any) -> list[float]:
        return [row["reward"] for row in rows]

    config = getattr(trl, f"{case.trainer}Config")(
        output_dir="trl",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        per_device_train_batch_size=len(rows),
        gradient_accumulation_steps=1,
        num_generations=len(groups[0]),
        num_iterations=2,
        max_completion_length=32,
        temperature=TEMPERATURE,
        **{"beta": 0.0} | case.theirs,
    )
    trainer = Trainer(
        model=str(policy),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "not used"}]),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    if case.has_kl:
        trainer.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(other).state_dict())
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow(minutes=0.05)) for name in CASES]
)
def test_loss_and_gradient_equal_trls(name: str, fit: Callable[..., int], brief: Path, other: Path) -> None:
    case = CASES[name]
    options = "--rollout.sampling.num_responses 4 --model.optimizer.lr 0.02 --model.loss " + case.ours
    options += f" --model.reference {other}" if case.has_kl else ""
    recorder = "tests.algorithms.update_recorder.UpdateRecorder"
    assert fit("--model.policy", str(brief), "--trainer.callbacks+", recorder, *options.split()) == 0
    groups = stored_prompts()
    rows = [row for group in groups for row in group]
    assert len({len(row["response_tokens"]) for row in rows}) > 9
    assert 0 < sum(row["finished"] for row in rows) < len(rows)

    trainer = make_trainer(case, brief, other, groups)
    batch = trainer._generate_and_score_completions([{"prompt": "not used"} for _ in rows])
    losses, updates = logged_losses(), UpdateRecorder.updates
    assert len(losses) == len(updates) == 2
    clipped: list[list[float]] = []
    for update, loss in zip(updates, losses, strict=True):
        trainer.model.load_state_dict(update.weights, strict=False)
        trainer.model.zero_grad()
        value = trainer._compute_loss(trainer.model, batch)
        value.backward()
        assert loss == pytest.approx(value.item(), rel=1e-5, abs=1e-5)
        expected = {key: p.grad for key, p in trainer.model.named_parameters() if p.grad is not None}
        assert update.gradient.keys() == expected.keys()
        size = max(gradient.abs().max().item() for gradient in expected.values())
        assert size > 1e-4
        for key, gradient in expected.items():
            torch.testing.assert_close(update.gradient[key], gradient, rtol=1e-5, atol=1e-5 * size)
    assert logged("train/ess")[0] == 1 > logged("train/ess")[1]  # the first ratios are exactly 1
    assert all(logged(f"train/kl_old/{kind}")[0] == 0 for kind in ("k1", "k2", "k3"))
    for theirs in case.clips.split():
        shares = trainer._metrics["train"][theirs]
        assert logged("train/clip_low" if "low" in theirs else "train/clip_high") == pytest.approx(shares, abs=1e-6)
        clipped.append(shares)
    assert all(shares[0] == 0 for shares in clipped)
    assert not clipped or max(shares[1] for shares in clipped) > 0
