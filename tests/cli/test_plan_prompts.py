"""`rlhf-pl plan`: the prompts and the machine that it counts with."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.__main__ import main
from rlhf_pl.cli.plan_machine import count_devices, device_bytes
from rlhf_pl.cli.plan_prompts import plan_prompts
from rlhf_pl.data import RoundDataModule
from rlhf_pl.models.chat import encode_prompt
from rlhf_pl.modules import RebelModule
from rlhf_pl.utils.errors import InputError


def _write(path: Path, words: list[int]) -> str:
    path.write_text("".join(json.dumps({"prompt": f"{i} " + "word " * n}) + "\n" for i, n in enumerate(words)))
    return str(path)


def _tokens(module: Any, words: int, number: int) -> int:
    return len(encode_prompt(module.source.tokenizer, [{"role": "user", "content": f"{number} " + "word " * words}]))


@pytest.mark.parametrize("rows", [12, 700])
def test_lengths_are_those_of_the_file(llama: Path, tmp_path: Path, rows: int) -> None:
    words = [random.Random(i).randrange(1, 9) for i in range(rows)]
    words[rows // 2] = 40  # one long prompt, which a sample may miss
    module = RebelModule(str(llama))
    longest = _tokens(module, 40, rows // 2)
    file = _write(tmp_path / "p.jsonl", words)
    found = plan_prompts(module, RoundDataModule(file, max_prompt_tokens=longest + 9))
    assert found.longest == longest
    mean = sum(_tokens(module, n, i) for i, n in enumerate(words)) / rows
    assert found.typical == pytest.approx(mean, rel=1e-9 if rows == 12 else 0.1)
    assert found.count + found.held_out == rows
    assert plan_prompts(module, RoundDataModule(file, max_prompt_tokens=longest - 1)).longest <= longest - 1
    with pytest.raises(InputError, match="max_prompt_tokens=1"):
        plan_prompts(module, RoundDataModule(file, max_prompt_tokens=1))


@pytest.mark.parametrize(
    ("rows", "given", "held_out"),
    [(4, None, 0), (5, None, 1), (40, None, 8), (400, None, 64), (40, 0, 0), (40, 7, 7), (40, 0.01, 1), (40, 0.5, 20)],
)
def test_the_held_out_prompts_are_those_of_the_run(
    llama: Path, tmp_path: Path, rows: int, given: float | None, held_out: int
) -> None:
    data = RoundDataModule(_write(tmp_path / "p.jsonl", [1] * rows), val_prompts=given)
    found = plan_prompts(RebelModule(str(llama)), data)
    assert (found.count, found.held_out) == (rows - held_out, held_out)


def test_a_data_set_that_is_not_here_takes_the_configs_limits(llama: Path) -> None:
    found = plan_prompts(RebelModule(str(llama)), RoundDataModule("owner/prompts", max_prompt_tokens=80))
    assert (found.typical, found.longest, found.is_known) == (40, 80, False)
    with pytest.raises(InputError, match=r"typo\.jsonl"):
        plan_prompts(RebelModule(str(llama)), RoundDataModule("data/typo.jsonl"))


@pytest.mark.parametrize(("devices", "count"), [("auto", 1), (3, 3), ("3", 3), ([0, 1], 2), ("0,1,3", 3)], ids=str)
def test_devices_are_counted_as_lightning_does(devices: Any, count: int) -> None:
    assert count_devices(devices, on_gpu=False) == count


def test_processes_of_a_cpu_share_its_memory(capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path) -> None:
    arguments = ["plan", "--model.policy", str(llama), "--data.prompts", _write(tmp_path / "p.jsonl", [1] * 9)]
    arguments += ["--rollout.reward", "examples.short_answer.score", "--trainer.devices", "2"]
    assert main([*arguments, "--trainer.accelerator", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "2 x CPU process" in out
    assert "this machine's memory for each of 2 processes" in out
    assert "measured just now" in out
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_bytes(False, 2) == total / 2
    assert main([*arguments, "--trainer.accelerator", "gpu"]) == 0
    out = capsys.readouterr().out
    assert "2 x GPU" in out
    assert "150 TFLOP/s a device (assumed)" in out


def test_the_memory_of_a_device_means_gpus_unless_the_config_says_cpu(
    capsys: pytest.CaptureFixture[str], llama: Path, tmp_path: Path
) -> None:
    arguments = ["plan", "--model.policy", str(llama), "--data.prompts", _write(tmp_path / "p.jsonl", [1] * 9)]
    arguments += ["--rollout.reward", "examples.short_answer.score", "--trainer.devices", "2"]
    arguments += ["--device_memory_gib", "80", "--tflops", "1"]
    assert main(arguments) == 0
    assert "2 x GPU" in capsys.readouterr().out
    assert main([*arguments, "--trainer.accelerator", "cpu"]) == 0
    assert "2 x CPU process" in capsys.readouterr().out
