"""Training reward models: the loss, its gradient, and what the exported folder scores."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from rlhf_pl import LoRA, PreferenceDataModule, RewardModelModule
from rlhf_pl.callbacks import EpochRun, HFExport, RoundCheckpoint
from rlhf_pl.classifier import ClassifierLM, new_classifier
from rlhf_pl.errors import InputError
from rlhf_pl.losses import bradley_terry_loss, centering_loss
from rlhf_pl.optim import AdamW
from rlhf_pl.pair_metrics import pair_metrics
from rlhf_pl.policy import PolicySource
from rlhf_pl.rewards import ClassifierReward, Sample
from tests.conftest import save_llama
from tests.rewards.test_classifier import plain_scores

Write = Callable[..., str]
# the preferred answer says "good": something that a small model can learn
ROWS = [
    {"prompt": f"Question {i % 7}?", "chosen": f"A good answer {i}", "rejected": f"A bad answer {i + 1}"}
    for i in range(40)
]


def test_loss_worked_by_hand() -> None:
    """-log sigmoid(2 - 1) = log(1 + exp(-1)); a tie of margin m costs the mean of both sides; targets shift both."""
    margins, labels = torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.5])
    targets = torch.tensor([1.0, 0.0])
    expected = [math.log(1 + math.exp(-1)), (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.5))) / 2]
    assert bradley_terry_loss(margins, labels, targets).tolist() == pytest.approx(expected)
    assert centering_loss(torch.tensor([2.0]), torch.tensor([-0.5])).tolist() == [2.25]


def test_gradient_raises_the_margin_and_vanishes_at_a_tie() -> None:
    margins = torch.tensor([0.3, 0.0], requires_grad=True)
    bradley_terry_loss(margins, torch.tensor([1.0, 0.5]), torch.zeros(2)).sum().backward()
    assert margins.grad is not None
    assert margins.grad[0] < 0
    assert margins.grad[1] == 0


def test_metrics_worked_by_hand() -> None:
    """Two of four right, one equal: 2.5 / 4. Sigmoid(|3|) is sure and right, so is hardly off."""
    metrics = pair_metrics([3.0, 3.0, -1.0, 0.0], [1.0, 0.0, 1.0, 0.5])
    assert (metrics.pairs, metrics.accuracy, metrics.margin, metrics.longer) == (4, 0.625, 1.25, 0.625)
    assert pair_metrics([3.0] * 10, [1.0] * 10).calibration_error == pytest.approx(1 - 1 / (1 + math.exp(-3)), abs=1e-4)


def fit(
    folder: Path, backbone: Path, file: str, module: dict[str, Any] | None = None, **options: Any
) -> dict[str, float]:
    L.seed_everything(3, verbose=False)
    data = {"val_preferences": 0.25, "max_tokens": 64, "batch_size": 4} | options.pop("data", {})
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EpochRun(), RoundCheckpoint(every_n_updates=3), HFExport(dtype="float32")],
        **{"max_epochs": 2} | options,
    )
    rm = RewardModelModule(str(backbone), **{"optimizer": lambda p: AdamW(p, lr=3e-3)} | (module or {}))
    trainer.fit(rm, datamodule=PreferenceDataModule(file, **data), ckpt_path=options.get("ckpt_path"))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("lora", [None, LoRA(rank=8)])
def test_learns_and_its_folder_scores_alike_everywhere(
    llama: Path, tmp_path: Path, write_jsonl: Write, lora: LoRA | None
) -> None:
    metrics = fit(tmp_path / "run", llama, write_jsonl(ROWS), {"lora": lora, "centering": 0.01})
    assert metrics["val/accuracy"] > 0.9
    folder = tmp_path / "run" / "model"
    reward = ClassifierReward(str(folder))
    pairs = [
        [Sample("x", [{"role": "user", "content": "Question 1?"}], f"A {word} answer 99")] for word in ("good", "bad")
    ]
    good, bad = (reward.score(batch)[0].reward for batch in pairs)
    assert good > bad + 0.5
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    from tests.rewards.test_classifier import SAMPLES

    ours = [r.reward for r in reward.score(SAMPLES)]
    assert ours == pytest.approx(plain_scores(folder), abs=1e-4)


def test_lora_leaves_the_backbone_as_it_was(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    from safetensors.torch import load_file

    fit(tmp_path, llama, write_jsonl(ROWS), {"lora": LoRA(rank=2, target_modules=["q_proj"])}, max_epochs=1)
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    changed = {n for n, t in after.items() if n in before and not torch.equal(t, before[n])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_accumulated_micro_batches_equal_one_batch(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    from safetensors.torch import load_file

    file = write_jsonl(ROWS)
    splits: dict[str, tuple[int, int, int | None]] = {"one": (8, 1, None), "four": (2, 4, None), "tokens": (8, 1, 100)}
    for folder, (size, accumulate, tokens) in splits.items():
        data = {"batch_size": size, "max_tokens_per_batch": tokens, "val_preferences": 3}
        fit(tmp_path / folder, llama, file, data=data, accumulate_grad_batches=accumulate, max_epochs=1)
    kept = torch.load(tmp_path / "tokens" / "checkpoints" / "last.ckpt", weights_only=False)
    assert kept["rlhf_pl_split"]["accumulate"] > 1
    eager = {"attn_implementation": "eager"}  # which shares nothing
    fit(tmp_path / "eager", llama, file, eager, data={"batch_size": 8, "val_preferences": 3}, max_epochs=1)
    one, *others = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in (*splits, "eager"))
    for other in others:
        for name, tensor in one.items():
            assert torch.allclose(tensor, other[name], atol=2e-4), name


@pytest.mark.parametrize("tokens", [None, 100])
def test_goes_on_inside_an_epoch_as_if_never_stopped(
    llama: Path, tmp_path: Path, write_jsonl: Write, tokens: int | None
) -> None:
    from safetensors.torch import load_file

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 10:
                raise KeyError("power cut")

    file = write_jsonl(ROWS)
    fit(tmp_path / "whole", llama, file, data={"max_tokens_per_batch": tokens})
    L.seed_everything(3, verbose=False)
    run = tmp_path / "cut"
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": run,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    data: dict[str, Any] = {"val_preferences": 0.25, "max_tokens": 64, "batch_size": 4, "max_tokens_per_batch": tokens}
    for stop in (True, False):
        callbacks = [EpochRun(), RoundCheckpoint(every_n_updates=3), HFExport(dtype="float32")]
        trainer = L.Trainer(**settings, callbacks=[*callbacks, *([Stop()] if stop else [])])
        rm = RewardModelModule(str(llama), optimizer=lambda p: AdamW(p, lr=3e-3))
        last = None if stop else str(run / "checkpoints" / "last.ckpt")
        try:
            trainer.fit(rm, datamodule=PreferenceDataModule(file, **data), ckpt_path=last)
        except KeyError:
            assert stop
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def set_up(llama: Path, file: str) -> PreferenceDataModule:
    data = PreferenceDataModule(file, val_preferences=10, max_tokens=64)
    data.trainer = L.Trainer(logger=False, accelerator="cpu")
    data.trainer.strategy._lightning_module = RewardModelModule(str(llama))
    data.setup("fit")
    return data


def test_beginnings_that_are_shared_give_the_loss_and_gradient_of_padded_rows(llama: Path, write_jsonl: Write) -> None:
    rows = [*ROWS[:20], {"prompt": "A?", "chosen": "Good, of course", "rejected": "Good"}]
    dataset = set_up(llama, write_jsonl(rows)).train_set
    assert dataset is not None
    model = new_classifier(PolicySource(str(llama)), seed=0)
    dataset.pad_id = model.config.pad_token_id = 1
    classifier = ClassifierLM(model)
    assert classifier.shares_prompts
    found, tokens = [], []
    for shares in (True, False):
        dataset.shares_prompts = shares
        batch = dataset.__getitems__((list(range(len(dataset))), 1.0))
        tokens.append(batch.inputs["input_ids"].numel())
        chosen, rejected = classifier(**batch.inputs).view(-1, 2).T
        loss = bradley_terry_loss(chosen - rejected, batch.labels, batch.margins).mean()
        found.append((loss.detach(), *torch.autograd.grad(loss, list(classifier.parameters()))))
        assert tokens[-1] == sum(dataset.lengths()) or not shares
    assert tokens[0] < 0.8 * tokens[1]
    for shared, padded in zip(*found, strict=True):
        torch.testing.assert_close(shared, padded, atol=1e-5, rtol=1e-4)


def test_pairs_of_a_prompt_are_on_one_side(llama: Path, write_jsonl: Write) -> None:
    data = set_up(llama, write_jsonl(ROWS))
    assert data.train_set is not None
    assert data.val_set is not None
    sides = [{p.messages[-1]["content"] for p in side.pairs} for side in (data.train_set, data.val_set)]
    assert not sides[0] & sides[1]
    assert len(data.val_set) >= 10


def test_wrong_inputs(tmp_path: Path, write_jsonl: Write, llama: Path) -> None:
    with pytest.raises(InputError, match="centering` must be 0 or more"):
        RewardModelModule("x", centering=-1)
    with pytest.raises(InputError, match=r"`model.backbone`: no folder"):
        fit(tmp_path, tmp_path / "none", write_jsonl(ROWS))
    with pytest.raises(InputError, match="leaves none of 40 rows to train on"):
        fit(tmp_path, llama, write_jsonl(ROWS), data={"val_preferences": 40})
    (save_llama(tmp_path / "bare") / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        fit(tmp_path / "run", tmp_path / "bare", write_jsonl(ROWS))
