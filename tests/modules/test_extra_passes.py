"""A user's module has its critic's values stored beside the log-probs, once a round, for its loss."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor

from rlhf_pl import PolicyLoss, RebelModule, RoundDataModule, SamplingConfig, TransformersSampler
from rlhf_pl.algorithms.prompt_groups import PromptGroups
from rlhf_pl.callbacks import RoundCheckpoint, RoundRefresh
from rlhf_pl.models.packed_batch import PackedBatch
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.data.test_policy_module import constant
from tests.integration.test_fit import PROMPTS


class Baseline(PolicyLoss):
    """REINFORCE over tokens with a critic's values as the baseline; it keeps what it got."""

    needs = frozenset({"rewards", "old_values"})
    per = "token"
    seen: ClassVar[list[tuple[int, float]]] = []

    def losses(self, groups: PromptGroups) -> Tensor:
        values = groups.stored["old_values"]
        assert values.shape == groups.token_logps.shape
        assert not values.requires_grad
        sums = groups.sum_per_response(values).tolist()
        if groups.token_logps.requires_grad:
            self.seen.extend(zip(groups.lengths.tolist(), sums, strict=True))
        return -(groups.per_token(groups.rewards) - values) * groups.token_logps


class Critic(RebelModule):
    """A stand-in for a critic: its values change with every update."""

    extra_passes = ("old_values",)
    computed = 0

    def old_values(self, rows: PackedBatch, temperature: float) -> Tensor:
        assert not torch.is_grad_enabled()
        self.computed += rows.num_responses
        return rows.targets.float() / 100 + self.trainer.global_step


def fit(folder: Path, llama: Path, prompts: str, max_steps: int) -> Critic:
    L.seed_everything(5, verbose=False)
    module = Critic(str(llama), Baseline(), lambda p: torch.optim.AdamW(p, lr=1e-3), constant)
    sampling = SamplingConfig(num_responses=3, max_response_tokens=8)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        max_steps=max_steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            RoundRefresh("tests.integration.test_fit.reward", TransformersSampler(), sampling),
            RoundCheckpoint(),
        ],
    )
    last = folder / "checkpoints" / "last.ckpt"
    data = RoundDataModule(prompts, max_prompt_tokens=64, val_prompts=0, batch_size=2)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=False)
    return module


def test_values_are_computed_once_a_round_and_reach_the_loss(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]
) -> None:
    prompts, responses = write_jsonl(PROMPTS), 3 * len(PROMPTS)
    Baseline.seen.clear()
    assert fit(tmp_path / "run", llama, prompts, 1).computed == responses
    stored = RoundStore(tmp_path / "run").round(0)
    first = stored.read("logps")
    assert first.column_names == ["prompt_id", "response_index", "old_values"]
    tokens = {(r["prompt_id"], r["response_index"]): r["response_tokens"] for r in stored.read("responses").to_pylist()}
    for row in first.to_pylist():
        expected = [token / 100 for token in tokens[row["prompt_id"], row["response_index"]]]
        assert row["old_values"] == pytest.approx(expected)

    per_round = -(-len(PROMPTS) // 2)
    module = fit(tmp_path / "run", llama, prompts, per_round + 1)  # goes on inside round 0
    assert module.computed == responses  # those of round 1 alone
    second = RoundStore(tmp_path / "run").round(1).read("logps")["old_values"].to_pylist()
    assert stored.read("logps").equals(first)
    of_rounds = [(len(v), pytest.approx(sum(v), rel=1e-5)) for v in first["old_values"].to_pylist()]
    trained = Baseline.seen[:responses]
    assert sorted(trained) == sorted(of_rounds, key=lambda pair: (pair[0], pair[1].expected))
    assert all(value >= per_round for values in second for value in values)  # of the critic as it was then


def test_a_need_that_the_module_does_not_compute_is_refused(llama: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"Baseline needs old_values\. Available: rewards, .*kto_z_ref\. Values come from",
    ):
        RebelModule(str(llama), Baseline())
