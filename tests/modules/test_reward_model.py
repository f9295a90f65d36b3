"""Training of reward models: the loss, its gradient, and the scores of the exported folder."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from rlhf_pl import LoRA, PreferenceDataModule, RewardModelModule
from rlhf_pl.algorithms.agreement import pair_metrics, wilson_interval
from rlhf_pl.algorithms.losses import bradley_terry_loss, centering_loss
from rlhf_pl.callbacks import EpochRun, HFExport, RoundCheckpoint
from rlhf_pl.models.sequence_classifier import ClassifierLM, new_classifier
from rlhf_pl.models.source import ModelSource
from rlhf_pl.optim import AdamW
from rlhf_pl.rewards import ClassifierReward, Sample
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_llama
from tests.rewards.test_classifier import SAMPLES, plain_scores

Write = Callable[..., str]
# the preferred response says "good", which a small model can learn
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
    """Two of four are right, one is equal: 2.5 / 4. Sigmoid(|3|) is near 1 and right, so its error is small."""
    metrics = pair_metrics([3.0, 3.0, -1.0, 0.0], [1.0, 0.0, 1.0, 0.5])
    assert metrics.equal == 1
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
def test_a_reward_model_learns_and_its_folder_scores_equally_everywhere(
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
    ours = [r.reward for r in reward.score(SAMPLES)]
    assert ours == pytest.approx(plain_scores(folder), abs=1e-4)


def test_lora_leaves_the_backbone_unchanged(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
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
    saved = torch.load(tmp_path / "tokens" / "checkpoints" / "last.ckpt", weights_only=False)
    assert saved["rlhf_pl_split"]["accumulate"] > 1
    eager = {"attn_implementation": "eager"}  # shares no prompts
    fit(tmp_path / "eager", llama, file, eager, data={"batch_size": 8, "val_preferences": 3}, max_epochs=1)
    one, *others = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in (*splits, "eager"))
    for other in others:
        for name, tensor in one.items():
            assert torch.allclose(tensor, other[name], atol=2e-4), name


@pytest.mark.parametrize("tokens", [None, 100])
def test_a_run_resumed_inside_an_epoch_equals_an_uninterrupted_one(
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
    run = tmp_path / "stopped"
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
    whole, again = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def set_up(llama: Path, file: str) -> PreferenceDataModule:
    data = PreferenceDataModule(file, val_preferences=10, max_tokens=64)
    data.trainer = L.Trainer(logger=False, accelerator="cpu")
    data.trainer.strategy._lightning_module = RewardModelModule(str(llama))
    data.setup("fit")
    return data


def test_shared_prefixes_give_the_loss_and_gradient_of_padded_rows(llama: Path, write_jsonl: Write) -> None:
    rows = [*ROWS[:20], {"prompt": "A?", "chosen": "Good, of course", "rejected": "Good"}]
    dataset = set_up(llama, write_jsonl(rows)).train_set
    assert dataset is not None
    model = new_classifier(ModelSource(str(llama)), seed=0)
    dataset.pad_id = model.config.pad_token_id = 1
    classifier = ClassifierLM(model)
    assert classifier.shares_prompts
    found, tokens = [], []
    for shares in (True, False):
        dataset.shares_prompts = shares
        batch = dataset.__getitems__((list(range(len(dataset))), (1.0,)))
        tokens.append(batch.inputs["input_ids"].numel())
        chosen, rejected = classifier(**batch.inputs).view(-1, 2).T
        loss = bradley_terry_loss(chosen - rejected, batch.labels, batch.margins).mean()
        found.append((loss.detach(), *torch.autograd.grad(loss, list(classifier.parameters()))))
        assert tokens[-1] == sum(dataset.lengths()) or not shares
    assert tokens[0] < 0.8 * tokens[1]
    for shared, padded in zip(*found, strict=True):
        torch.testing.assert_close(shared, padded, atol=1e-5, rtol=1e-4)


def test_pairs_of_a_prompt_are_in_the_same_split(llama: Path, write_jsonl: Write) -> None:
    data = set_up(llama, write_jsonl(ROWS))
    assert data.train_set is not None
    assert data.val_set is not None
    train, val = ({p.messages[-1]["content"] for p in split.pairs} for split in (data.train_set, data.val_set))
    assert not train & val
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


def plain_batch(folder: Path, side: str) -> list[float]:
    """Scores by the classifier and padding of transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chats = [[*s.messages, {"role": "assistant", "content": s.response}] for s in SAMPLES]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True, padding_side=side)
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0].tolist()


@pytest.mark.parametrize("pad_token", ["<|end|>", None])
def test_exports_have_their_own_padding_token(
    tmp_path: Path, write_jsonl: Write, pad_token: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backbone whose padding token is its EOS, or is missing: the embeddings get one more row."""
    from transformers import AutoTokenizer

    backbone = save_llama(tmp_path / "backbone", pad_token_id=None if pad_token is None else 2)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(backbone)
    fit(tmp_path / "run", backbone, write_jsonl(ROWS), max_epochs=1)
    folder = tmp_path / "run" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == AutoTokenizer.from_pretrained(folder).pad_token_id == len(tokenizer)
    assert config["vocab_size"] == len(tokenizer) + 1
    assert "warning" not in capsys.readouterr().out
    ours = [r.reward for r in ClassifierReward(str(folder)).score(SAMPLES)]
    for found in (plain_scores(folder), plain_batch(folder, "right"), plain_batch(folder, "left")):
        assert found == pytest.approx(ours, abs=1e-4)
    fit(tmp_path / "again", folder, write_jsonl(ROWS), max_epochs=1)  # the next stage keeps it
    assert json.loads((tmp_path / "again/model/config.json").read_text())["pad_token_id"] == len(tokenizer)


def test_a_model_that_is_read_before_the_eos_prints_a_warning(
    llama: Path, tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_pl.models.score_position._warned", set())
    fit(tmp_path, llama, write_jsonl(ROWS), {"score_at": "before_eos"}, max_epochs=1)
    assert "`model.score_at` is before_eos" in capsys.readouterr().out
    folder = tmp_path / "model"
    reward = ClassifierReward(str(folder))
    ours = [r.reward for r in reward.score(SAMPLES)]
    rows = [reward.renderer()(s.messages, s.response).ids for s in SAMPLES]
    assert all(row[-1] != 2 for row in rows)
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert ours == pytest.approx(expected, abs=1e-4)


def test_accuracy_and_its_interval_exclude_ties(
    llama: Path, tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held out: 4 pairs and 6 ties. An interval over 10 would be narrower."""
    clear = [{"prompt": f"Held out {i}?", "chosen": f"A good {i}", "rejected": f"A bad one {i}"} for i in range(4)]
    ties = [{"prompt": f"Tie {i}?", "chosen": f"Longer {i}", "rejected": f"So {i}", "label": 0.5} for i in range(6)]
    data = {"ties": "half", "val_preferences": write_jsonl([*clear, *ties], "val.jsonl")}
    metrics = fit(tmp_path, llama, write_jsonl(ROWS), data=data, max_epochs=1)
    low, high = wilson_interval(metrics["val/accuracy"], 4)
    output = " ".join(capsys.readouterr().out.split())
    assert f"(95%: {low:.3f} to {high:.3f}, 4 pairs and 6 ties)" in output
    assert metrics["val/longer_accuracy"] == 0.25 * sum(len(r["chosen"]) > len(r["rejected"]) for r in clear)
