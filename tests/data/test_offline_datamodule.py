"""Training on pairs that were sampled and scored elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from rlhf_pl import OfflineDataModule, RebelLoss, RebelModule
from rlhf_pl.callbacks import EpochRun, HFExport, OfflineLogps, RoundCheckpoint
from rlhf_pl.optim import AdamW
from rlhf_pl.store.provenance import ChangedSettingsError
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer

Write = Callable[..., str]
PLAIN = [
    {
        "prompt": f"Say {i}",
        "chosen": f"I say {i}.",
        "rejected": f"No {i}, never.",
        "chosen_reward": 1.0 + i / 10,
        "rejected_reward": i / 20,
    }
    for i in range(10)
]


def published(row: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A row as published by REBEL's authors: other column names, padded token columns."""
    tokenizer = make_tokenizer()
    pad = len(tokenizer)  # an id outside the vocabulary, like their [PAD]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = ids(f"<s><|user|>{row['prompt']}<|end|><|assistant|>")
    chosen, reject = ids(row["chosen"] + "<|end|>"), ids(row["rejected"] + "<|end|>")
    return {
        "prompt_id": row["prompt"],
        "prompt": row["prompt"],
        "chosen": row["chosen"],
        "reject": row["rejected"],
        "chosen_reward": row["chosen_reward"],
        "reject_reward": row["rejected_reward"],
        "llama_prompt_tokens": [pad] * (40 - len(prompt)) + prompt,
        "llama_chosen_tokens": chosen + [pad] * (60 - len(chosen)),
        "llama_reject_tokens": reject + [pad] * (60 - len(reject)),
        **more,
    }


def fit(folder: Path, llama: Path, file: str, data: dict[str, Any] | None = None, **options: Any) -> RebelModule:
    L.seed_everything(4, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EpochRun(), OfflineLogps(), RoundCheckpoint(), HFExport(dtype="float32")],
        **{"max_epochs": 2} | options,
    )
    module = RebelModule(str(llama), loss=RebelLoss(2.0), optimizer=lambda p: AdamW(p, lr=1e-3))
    trainer.fit(module, datamodule=OfflineDataModule(file, **{"val_pairs": 3} | (data or {})))
    return module


def stored_rows(folder: Path, stage: str) -> list[dict[str, Any]]:
    return RoundStore(folder).round(0).read(stage).to_pylist()


def test_training_moves_the_margins_towards_the_rewards(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    file = write_jsonl(PLAIN)
    losses = []
    for epochs in (1, 6):
        module = fit(tmp_path / str(epochs), llama, file, max_epochs=epochs)
        losses.append(float(module.trainer.callback_metrics["val/loss"]))
    assert losses[1] < losses[0]


def test_updates_divided_by_tokens_are_the_same(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    """In micro-batches of two pairs, and of a single response: pairs are split, also the held-out ones."""
    file = write_jsonl(PLAIN)
    plain = fit(tmp_path / "pairs", llama, file, max_epochs=1)
    expected, metrics = plain.state_dict(), plain.trainer.callback_metrics
    for tokens in (60, 25):
        split = fit(tmp_path / str(tokens), llama, file, {"max_tokens_per_batch": tokens}, max_epochs=1)
        assert split.trainer.num_training_batches > plain.trainer.num_training_batches
        assert split.trainer.global_step == plain.trainer.global_step
        for name, tensor in split.state_dict().items():
            assert torch.allclose(tensor, expected[name], atol=2e-4), name
        for name in split.val_metrics:
            assert split.trainer.callback_metrics[name] == pytest.approx(float(metrics[name]), rel=1e-2), name


def test_published_columns_give_the_same_pairs_as_plain_ones(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    fit(tmp_path / "plain", llama, write_jsonl(PLAIN, "plain.jsonl"), max_epochs=1)
    fit(tmp_path / "theirs", llama, write_jsonl([published(r) for r in PLAIN], "theirs.jsonl"), max_epochs=1)
    for stage in ("responses", "pairs", "logps"):
        plain, theirs = (
            [{**r, "prompt_id": ""} for r in stored_rows(tmp_path / n, stage)] for n in ("plain", "theirs")
        )
        assert plain == theirs


def test_a_run_is_resumed_and_other_settings_are_refused(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    from safetensors.torch import load_file

    file = write_jsonl(PLAIN)
    fit(tmp_path / "whole", llama, file)

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise KeyError("killed")

    settings: dict[str, Any] = {"accelerator": "cpu", "default_root_dir": tmp_path / "resumed", "logger": False}
    for stop in (True, False):
        L.seed_everything(4, verbose=False)
        callbacks = [EpochRun(), OfflineLogps(), RoundCheckpoint(), HFExport(dtype="float32")]
        trainer = L.Trainer(
            **settings,
            max_epochs=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*callbacks, *([Stop()] if stop else [])],
        )
        module = RebelModule(str(llama), loss=RebelLoss(2.0), optimizer=lambda p: AdamW(p, lr=1e-3))
        last = None if stop else str(tmp_path / "resumed" / "checkpoints" / "last.ckpt")
        try:
            trainer.fit(module, datamodule=OfflineDataModule(file, val_pairs=3), ckpt_path=last)
        except KeyError:
            assert stop
    whole, resumed = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    with pytest.raises(ChangedSettingsError, match=r"temperature: 1\.0 -> 0\.5"):
        fit(tmp_path / "whole", llama, file, {"temperature": 0.5})


def test_useless_pairs_are_counted_and_invalid_rows_named(
    llama: Path, tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    same = PLAIN[0] | {"rejected": PLAIN[0]["chosen"]}
    equal = PLAIN[1] | {"rejected_reward": PLAIN[1]["chosen_reward"]}
    long = PLAIN[2] | {"prompt": "word " * 100}
    file = write_jsonl([*PLAIN, same, equal, long])
    fit(tmp_path / "run", llama, file, {"max_prompt_tokens": 40}, max_epochs=1)
    assert "left out: 1 of equal responses, 1 of equal rewards, 1 of long prompts" in " ".join(
        capsys.readouterr().out.split()
    )
    row = dict(PLAIN[0])
    del row["chosen_reward"]
    other_tokens = published(PLAIN[0]) | {"llama_chosen_tokens": [10, 11, 12]}
    for rows, message in (
        ([row], "no `chosen_reward`; found prompt.* or choose a loss without rewards"),
        ([PLAIN[0] | {"chosen_reward": "NaN"}], "`chosen_reward` is 'NaN'; expected a number"),
        ([PLAIN[0] | {"chosen": ""}], "the response in `chosen` is empty"),
        ([other_tokens], "the ids are of another model. `data.use_tokens: false`"),
        ([same], "no row of .* is left to train on; left out: 1 of equal responses"),
    ):
        with pytest.raises(InputError, match=message):
            fit(tmp_path / "other", llama, write_jsonl(rows), {"val_pairs": 0})


def test_manifest_holds_the_settings_of_the_round(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    fit(tmp_path, llama, write_jsonl(PLAIN), max_epochs=1)
    manifest = json.loads((tmp_path / "rounds" / "0000" / "manifest.json").read_text())
    assert manifest["settings"]["pairs"]["temperature"] == 1.0
    assert manifest["stages"]["logps"]["policies"] == ["old"]
