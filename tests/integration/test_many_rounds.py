"""Many short rounds in one process: memory stays constant, and the run leaves nothing behind."""

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
# torch's kernels for bfloat16, a few for each new shape: these caches are full after a few rounds
FULL_SOON = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


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


class WatchedRun:
    """A run whose processes and files are distinguishable from those of other runs on the machine.

    Args:
        folder: The folder of the run.
        model: The policy.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._mark = f"RLHF_PL_WATCHED={folder}"
        self._shared = self._list_shared_memory()
        name, value = self._mark.split("=")
        environment = os.environ | FULL_SOON | {name: value, "TMPDIR": str(self.temporary)}
        self.process = subprocess.Popen(command(folder, model), cwd=folder, env=environment)

    def find_leftovers(self) -> list[str]:
        """Find the run's live processes in any session, its unmapped shared memory, and its temporary files.

        Files of torch's cache do not count.
        """
        files = [str(file) for file in self.temporary.iterdir() if not file.name.startswith("torchinductor_")]
        return [*self._find_processes(), *files, *(self._list_shared_memory() - self._shared - self._list_mapped())]

    def _find_processes(self) -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found

    @staticmethod
    def _list_shared_memory() -> set[str]:
        return {str(file) for file in Path("/dev/shm").iterdir()}

    @staticmethod
    def _list_mapped() -> set[str]:
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


def test_memory_is_constant_and_nothing_is_left(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    run = WatchedRun(tmp_path, model)
    assert run.process.wait() == 0
    memory = memory_by_round(tmp_path / "run")
    assert len(memory) == ROUNDS
    assert memory[ROUNDS - 1] <= 1.05 * memory[4], memory
    assert run.find_leftovers() == []


def test_nothing_is_left_after_a_kill(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path, save_llama(tmp_path / "llama"))
    while not list((tmp_path / "run" / "rounds").glob("0001/pairs/*.parquet")):
        assert run.process.poll() is None
        time.sleep(0.05)
    assert run.find_leftovers() != [], "the processes must be visible while the run lives"
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    time.sleep(1)
    assert run.find_leftovers() == []
