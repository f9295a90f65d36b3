"""`RlhfTrainer`: the README's script prints nothing but the run, and resumes after a kill with the same weights."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_pl import (
    DPOLoss,
    OfflineDataModule,
    PPOModule,
    PreferenceDataModule,
    RebelModule,
    RewardModelModule,
    RlhfTrainer,
    RoundDataModule,
    SamplingConfig,
    SFTDataModule,
    SFTModule,
    TransformersSampler,
)
from rlhf_pl.callbacks import RoundRefresh

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def _script(llama: Path, prompts: Path) -> str:
    """The README's script, on a tiny model, a few prompts and the sampler that needs no compilation."""
    code = re.search(r"## From Python\n\n```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    text = code[1]
    for old, new in {
        "models/SmolLM2-135M-Instruct": str(llama),
        "data/prompts.jsonl": str(prompts),
        "prompts_per_round=64": "val_prompts=4, prompts_per_round=16, batch_size=1, max_prompt_tokens=128",
        "RoundRefresh(score,": "RoundRefresh(score, sampler=TransformersSampler(),",
        "max_response_tokens=64": "max_response_tokens=16",
        "SamplingConfig\n": "SamplingConfig, TransformersSampler\n",
        "max_epochs=3": "max_epochs=2",
        "callbacks=rounds": "callbacks=[rounds, RoundCheckpoint(every_n_updates=2)]",
        "import RoundRefresh": "import RoundCheckpoint, RoundRefresh",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.mark.slow(minutes=0.4)
def test_the_readmes_script_is_quiet_and_resumes_inside_a_round(tmp_path: Path, llama: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i} plus {i}?"}) + "\n" for i in range(36)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("RLHF_PL_VERBOSE", None)
    command = [sys.executable, "-c", _script(llama, prompts)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    done = subprocess.run(command, cwd=whole, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.strip() == ""
    for word in ("Tip", "Warning", "lightning/", "Using ", "GPU available", "Loading weights"):
        assert word not in done.stdout
    assert not list(whole.rglob("lightning_logs"))

    first = subprocess.Popen(command, cwd=killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(killed.rglob("update-*.ckpt")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    again = subprocess.run(command, cwd=killed, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "Resuming from runs/python/checkpoints/" in again.stdout
    weights, expected = (load_file(folder / "runs/python/model/model.safetensors") for folder in (killed, whole))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


_FURTHER = [pytest.mark.slow(minutes=0.1), pytest.mark.exhaustive]


@pytest.mark.parametrize(
    "kind",
    ["sft", pytest.param("reward model", marks=_FURTHER), pytest.param("offline pairs", marks=_FURTHER), "ppo"],
)
def test_other_modules_run_and_resume(
    kind: str, tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations, pairs = tmp_path / "sft.jsonl", tmp_path / "pairs.jsonl"
    texts = [f"What is {i} plus {i}?" for i in range(8)]
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": "Paris"}] for t in texts]
    conversations.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    pairs.write_text(
        "".join(json.dumps({"prompt": t, "chosen": "two dogs", "rejected": "Paris"}) + "\n" for t in texts)
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    steps = []
    for epochs in (1, 2):
        callbacks: list = []
        if kind == "sft":
            module, data = SFTModule(str(llama)), SFTDataModule(str(conversations), batch_size=2, max_tokens=64)
        elif kind == "reward model":
            module, data = RewardModelModule(str(llama)), PreferenceDataModule(str(pairs), batch_size=2, max_tokens=64)
        elif kind == "offline pairs":
            module, data = RebelModule(str(llama), loss=DPOLoss()), OfflineDataModule(str(pairs), batch_size=2)
        else:
            module, data = PPOModule(str(llama)), RoundDataModule(str(prompts), val_prompts=2, max_prompt_tokens=64)
            sampling = SamplingConfig(num_responses=2, max_response_tokens=4)
            callbacks = [RoundRefresh(len_of, sampler=TransformersSampler(), sampling=sampling)]
        trainer = RlhfTrainer(
            default_root_dir=str(tmp_path / "run"), max_epochs=epochs, accelerator="cpu", devices=1, callbacks=callbacks
        )
        trainer.fit(module, datamodule=data)
        steps.append(trainer.global_step)
        assert ("Resuming from" in capsys.readouterr().out) == (epochs == 2)
    assert steps[1] == 2 * steps[0] > 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def len_of(response: str) -> float:
    return float(len(response))
