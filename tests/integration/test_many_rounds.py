"""Many short rounds in one process: memory stays flat, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import save_llama

pytestmark = [
    pytest.mark.slow(minutes=1.2),
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM"),
    pytest.mark.timeout(600),
]
ROUNDS = 30


def command(
    folder: Path, model: Path, rounds: int = ROUNDS, sampler: Sequence[str] = ("--rollout.sampler.kv_cache_gib", "0.1")
) -> list[str]:
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text("def score(response):\n    return len(set(response)) / 10\n")
    options = {
        **{"model.policy": model, "model.optimizer.lr": "1e-4", "data.prompts": folder / "prompts.jsonl"},
        **{"data.prompts_per_round": 8, "data.val_prompts": 2, "data.max_prompt_tokens": 64},
        **{"rollout.reward": f"{folder}/reward.py:score"},
        **{"rollout.sampling.max_response_tokens": 16, "rollout.sampling.num_responses": 3},
        **{"trainer.max_epochs": rounds, "trainer.accelerator": "cpu", "trainer.default_root_dir": folder / "run"},
    }
    listed = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    return [sys.executable, "-m", "rlhf_pl", "fit", *listed, *sampler]


class Watched:
    """A run whose processes and files can be told from those of other runs on the machine.

    Args:
        folder: For the run.
        model: Its policy.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._mark = f"RLHF_PL_WATCHED={folder}"
        self._shared = self._shared_memory()
        name, value = self._mark.split("=")
        environment = os.environ | {name: value, "TMPDIR": str(self.temporary)}
        self.process = subprocess.Popen(command(folder, model), cwd=folder, env=environment)

    def left_behind(self) -> list[str]:
        """Live processes that came of it, whatever sessions they are in; memory nobody maps;
        temporary files, but for torch's cache."""
        files = [str(file) for file in self.temporary.iterdir() if not file.name.startswith("torchinductor_")]
        return [*self._processes(), *files, *(self._shared_memory() - self._shared - self._mapped())]

    def _processes(self) -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found

    @staticmethod
    def _shared_memory() -> set[str]:
        return {str(file) for file in Path("/dev/shm").iterdir()}

    @staticmethod
    def _mapped() -> set[str]:
        found: set[str] = set()
        for maps in Path("/proc").glob("[0-9]*/maps"):
            with suppress(OSError):
                found |= {line.split()[-1] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
        return found


def memory_by_round(run: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("system/resident_gib")]


def test_memory_is_flat_and_nothing_is_left(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    run = Watched(tmp_path, model)
    assert run.process.wait() == 0
    memory = memory_by_round(tmp_path / "run")
    assert len(memory) == ROUNDS
    assert memory[ROUNDS - 1] <= 1.05 * memory[4], memory
    assert run.left_behind() == []


def test_nothing_is_left_after_a_kill(tmp_path: Path) -> None:
    run = Watched(tmp_path, save_llama(tmp_path / "llama"))
    while not list((tmp_path / "run" / "rounds").glob("0001/pairs/*.parquet")):
        assert run.process.poll() is None
        time.sleep(0.05)
    assert run.left_behind() != [], "it can be seen while it lives"
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    time.sleep(1)
    assert run.left_behind() == []
