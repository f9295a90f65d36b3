"""`rlhf-pl plan` for runs over fixed data: what it counts is what such a run then has."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_pl.__main__ import main
from rlhf_pl.cli.plan_rows import plan_rows
from rlhf_pl.data import OfflineDataModule, PreferenceDataModule, SFTDataModule
from rlhf_pl.models.footprint import Kernels, activation_bytes
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules import RebelModule, RewardModelModule, SFTModule
from rlhf_pl.utils.disk import format_bytes
from rlhf_pl.utils.errors import InputError

ROWS = [
    {"prompt": f"What is {i} plus {i}?", "chosen": f"It is {2 * i}." + " Yes." * (i % 5),
     "rejected": "No." * (1 + i % 3), "chosen_reward": 1.0, "rejected_reward": 0.25}
    for i in range(50)
]  # fmt: skip
KINDS = {
    "SFTModule": ("policy", "SFTDataModule", "conversations"),
    "RewardModelModule": ("backbone", "PreferenceDataModule", "preferences"),
    "RebelModule": ("policy", "OfflineDataModule", "pairs"),
}


@pytest.fixture
def file(tmp_path: Path, write_jsonl: Callable[..., str]) -> str:
    return write_jsonl([row | {"response": row["chosen"]} for row in ROWS])


def _cell(table: str, row: str) -> list[str]:
    return [cell.strip() for cell in next(line for line in table.splitlines() if f"│ {row}" in line).split("│")[2:-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_updates_and_disk_are_those_of_the_run(
    kind: str, llama: Path, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, source = KINDS[kind]
    arguments = ["--model", kind, f"--model.{model}", str(llama), "--data", data, f"--data.{source}", file]
    arguments += [f"--data.val_{source}", "6", "--data.batch_size", "3", "--trainer.accumulate_grad_batches", "2"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.precision", "32-true"]
    arguments += ["--data.max_tokens", "100"] if kind == "SFTModule" else []
    assert main(["plan", "--tflops", "1", *arguments]) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(["fit", *arguments]) == 0
    (file,) = (tmp_path / "run" / "checkpoints").glob("after-*")
    updates = int(re.search(r"(\d+) updates an epoch", planned)[1])  # type: ignore[index]
    assert torch.load(file, weights_only=True)["global_step"] == 2 * updates
    end = _cell(planned, "checkpoints, 3 at most")[1]
    assert _number(end) == pytest.approx(file.stat().st_size / 2**10, rel=0.15)  # with its names, for so small a model
    exported = (tmp_path / "run" / "model" / "model.safetensors").stat().st_size
    assert _number(_cell(planned, "exported model")[1]) == pytest.approx(exported / 2**10, rel=0.05)
    assert "6 held out" in planned


def _number(size: str) -> float:
    """KiB of a size."""
    value, unit = size.split()
    return float(value) * {"KiB": 1, "MiB": 1024}[unit]


def test_lengths_are_those_of_the_rows(llama: Path, file: str) -> None:
    """A row is what `data.batch_size` counts; without shared prompts both responses are padded to the longer one."""
    policy, tokenizer = SFTModule(str(llama)), ModelSource(str(llama)).tokenizer

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    longest_chosen = max(range(50), key=lambda i: length(ROWS[i]["chosen"]))  # type: ignore[arg-type]
    alone = plan_rows(policy, SFTDataModule(file, packing=False, val_conversations=0, max_tokens=256))
    assert (alone.noun, alone.count, alone.is_known, alone.sequences) == ("conversations", 50, True, 1)
    assert alone.longest > length(ROWS[longest_chosen]["chosen"]) > 10  # type: ignore[arg-type]
    packed = plan_rows(policy, SFTDataModule(file, max_tokens=2 * alone.longest, val_conversations=0))
    assert packed.longest == 2 * alone.longest
    assert packed.count * packed.typical == pytest.approx(50 * alone.typical)
    assert packed.typical <= packed.longest
    shared, rows = (
        plan_rows(
            RewardModelModule(str(llama), attn_implementation=name), PreferenceDataModule(file, val_preferences=0)
        )
        for name in ("sdpa", "eager")
    )
    assert (shared.is_packed, rows.is_packed) == (True, False)
    assert rows.longest == 2 * rows.sequence > shared.longest > rows.sequence == shared.sequence
    assert rows.micro_batch(4, 1) == (8, rows.sequence)
    assert shared.micro_batch(4, 1) == (1, 4 * shared.longest)
    budget = PreferenceDataModule(file, val_preferences=0, max_tokens_per_batch=2 * shared.longest + 1)
    assert plan_rows(RewardModelModule(str(llama)), budget).micro_batch(4, 8) == (1, 2 * shared.longest)
    offline = plan_rows(RebelModule(str(llama)), OfflineDataModule(file, val_pairs=10))
    assert (offline.count, offline.held_out, offline.is_packed) == (40, 10, True)
    with pytest.raises(InputError, match="all are longer than max_tokens=9"):
        plan_rows(policy, SFTDataModule(file, max_tokens=9))


def test_memory_and_verdict(llama: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "--model",
        "RewardModelModule",
        "--model.backbone",
        str(llama),
        "--data",
        "PreferenceDataModule",
    ]
    arguments += ["--data.preferences", file, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    rows = plan_rows(RewardModelModule(str(llama)), PreferenceDataModule(file))
    activations = activation_bytes(ModelSource(str(llama)).config, *rows.micro_batch(8, 1), Kernels(half=False), False)
    assert _cell(out, "activations") == [format_bytes(activations)]
    assert "output head" not in out
    assert "Fits: the peak (train)" in out
    assert main([*arguments, "--device_memory_gib", "0.0001"]) == 1
    assert "Does not fit: train takes" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_needs_neither_weights_nor_the_data(
    kind: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((llama / "config.json").read_bytes())
    model, data, source = KINDS[kind]
    arguments: list[Any] = ["plan", "--model", kind, "--data", data, f"--data.{source}", "owner/rows", "--tflops", "1"]
    arguments += ["--data.max_tokens", "90"] if kind != "RebelModule" else []
    assert main([*arguments, f"--model.{model}", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "1,000 (assumed)" in out
    assert "'owner/rows' is not" in out
    assert main([*arguments, f"--model.{model}", "runs/none/of/them"]) == 1
    assert "name the one that that run starts from" in capsys.readouterr().err


@pytest.mark.parametrize(("held_out", "columns"), [(0, ["train"]), (6, ["train", "held-out", "sum"])])
def test_the_time_has_the_phases_that_the_run_has(
    llama: Path, file: str, held_out: int, columns: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--tflops", "1e-5", "--model", "SFTModule", "--model.policy", str(llama), "--data"]
    arguments += ["SFTDataModule", "--data.max_tokens", "100", "--data.conversations", file, "--data.val_conversations"]
    assert main([*arguments, str(held_out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if "time, an epoch of" in line)
    assert [cell.strip() for cell in header.split("┃")[2:-1]] == columns
    assert all(float(cell.replace(",", "")) > 0 for cell in _cell("\n".join(lines), "seconds"))


def test_modules_and_data_that_do_not_belong_together_are_refused(
    llama: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--model", "SFTModule", "--model.policy", str(llama)]
    assert main([*arguments, "--data", "PreferenceDataModule", "--data.preferences", file]) == 1
    assert "PreferenceDataModule does not provide what SFTModule trains on" in capsys.readouterr().err
    assert main(["plan", "--model.policy", str(llama), "--data.prompts", file]) == 1
    assert "`rollout.reward` is missing" in capsys.readouterr().err
