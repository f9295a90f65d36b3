"""Samplers get the weights that log-probs are computed with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from rlhf_pl.models.lora import LoRA
from rlhf_pl.models.rounding import round_to
from rlhf_pl.rounds.policy_snapshot import snapshot_policy
from tests.integration.test_fit import PROMPTS, fit


class SnapshotReader(L.Callback):
    """Reads the snapshot and the module's own weights after the first update; one norm is in float32 by then."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        norm = module.policy.lm.model.norm
        norm.weight.data = norm.weight.data.float() + 1e-4
        self.own = {name: weight.clone() for name, weight in module.weights().stream()}
        self.seen = dict(snapshot_policy(trainer, module).weights.stream())


@pytest.fixture
def seen(tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]) -> Callable[..., SnapshotReader]:
    def run(**module: Any) -> SnapshotReader:
        reader = SnapshotReader()
        options: dict[str, Any] = {"precision": "bf16-mixed", "max_steps": 1, "accumulate_grad_batches": 1}
        fit(tmp_path, llama, write_jsonl(PROMPTS), [reader], module, **options)
        return reader

    return run


def find_equal(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in expected.items() if torch.equal(seen[name], tensor)}


def test_merged_adapters_are_exact_and_other_weights_those_of_the_copies(seen: Callable[..., SnapshotReader]) -> None:
    reader = seen(lora=LoRA(rank=2, target_modules=["q_proj"]))
    copies = {name: round_to(weight, torch.bfloat16).float() for name, weight in reader.own.items()}
    merged = {name for name in reader.own if "q_proj" in name}
    assert find_equal(reader.seen, reader.own) >= merged
    assert find_equal(reader.seen, copies) == reader.own.keys() - merged


def test_weights_of_a_model_without_copies_stay(seen: Callable[..., SnapshotReader]) -> None:
    """A model in bfloat16 computes with its own weights, some of which may be in float32."""
    reader = seen(dtype="bfloat16")
    assert reader.own["model.norm.weight"].dtype == torch.float32
    assert find_equal(reader.seen, reader.own) == reader.own.keys()
