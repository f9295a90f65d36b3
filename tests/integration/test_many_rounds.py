"""Many short rounds in one process: memory stays flat, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import save_llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM"),
    pytest.mark.timeout(600),
]
ROUNDS = 30


def command(folder: Path, model: Path) -> list[str]:
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text("def score(response):\n    return len(set(response)) / 10\n")
    options = {
        **{"model.policy": model, "model.optimizer.lr": "1e-4", "data.prompts": folder / "prompts.jsonl"},
        **{"data.prompts_per_round": 8, "data.val_prompts": 2, "data.max_prompt_tokens": 64},
        **{"rollout.reward": f"{folder}/reward.py:score", "rollout.sampler.kv_cache_gib": 0.1},
        **{"rollout.sampling.max_response_tokens": 16, "rollout.sampling.num_responses": 3},
        **{"trainer.max_epochs": ROUNDS, "trainer.accelerator": "cpu", "trainer.default_root_dir": folder / "run"},
    }
    listed = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    return [sys.executable, "-m", "rlhf_pl", "fit", *listed]


def processes_of(group: int) -> list[str]:
    """Command lines of the processes in a process group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (OSError, ProcessLookupError):
            continue
    return found


def shared_files() -> set[str]:
    """What processes leave in the places where they share memory and sockets."""
    return {str(f) for place in ("/dev/shm", "/tmp") for f in Path(place).iterdir() if "pytest" not in f.name}


def listening_ports() -> set[str]:
    """Local addresses of TCP sockets that listen."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {fields[1] for fields in lines if fields[3] == "0A"}


def memory_by_round(run: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("system/resident_gib")]


def test_memory_is_flat_and_nothing_is_left(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    files, ports = shared_files(), listening_ports()
    process = subprocess.Popen(command(tmp_path, model), start_new_session=True, cwd=tmp_path)
    assert process.wait() == 0
    memory = memory_by_round(tmp_path / "run")
    assert len(memory) == ROUNDS
    assert memory[ROUNDS - 1] <= 1.05 * memory[4], memory
    assert processes_of(process.pid) == []
    assert shared_files() - files == set()
    assert listening_ports() - ports == set()


def test_nothing_is_left_after_a_kill(tmp_path: Path) -> None:
    files, ports = shared_files(), listening_ports()
    process = subprocess.Popen(command(tmp_path, save_llama(tmp_path / "llama")), start_new_session=True, cwd=tmp_path)
    while not list((tmp_path / "run" / "rounds").glob("0001/pairs/*.parquet")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)
    assert processes_of(process.pid) == []
    assert shared_files() - files == set()
    assert listening_ports() - ports == set()
