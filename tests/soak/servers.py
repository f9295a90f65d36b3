"""Three `vllm serve`: one is killed during a request, one restarts with its first weights, and one is slow.

    python -m tests.soak.servers [--rounds 4]

A run on a healthy fleet is repeated on a failing one. The trial succeeds if both end with the same responses and
weights, if every prompt's responses are in the round once, if no completed prompt was requested again, and if the
servers' counts show the failures.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf_pl.store.round_store import RoundStore
from tests.conftest import save_llama
from tests.soak.proxy import Proxy
from tests.vllm_serving import sampling_server

REWARD = "def score(response):\n    return len(set(response)) / 10\n"
PROMPTS = 24  # per round


def make_command(folder: Path, run: Path, urls: list[str], rounds: int) -> list[str]:
    """The command, with two concurrent prompts per server, so that others wait."""
    sampler = {
        "class_path": "VLLMServerSampler",
        "init_args": {"urls": urls, "dtype": "float32", "concurrency": 2, "retries": 2, "backoff_s": 0.5},
    }
    options = {
        **{"model.policy": folder / "llama", "model.optimizer.lr": "1e-3", "data.prompts": folder / "prompts.jsonl"},
        **{"data.prompts_per_round": PROMPTS, "data.val_prompts": 4, "data.max_prompt_tokens": 64},
        **{"data.batch_size": 4, "rollout.reward": f"{folder}/reward.py:score", "rollout.sampler": json.dumps(sampler)},
        **{"rollout.sampling.num_responses": 4, "rollout.sampling.max_response_tokens": 48},
        **{"trainer.max_epochs": rounds, "trainer.accelerator": "cpu", "trainer.default_root_dir": run},
    }
    return [
        *(sys.executable, "-m", "rlhf_pl", "fit"),
        *(str(text) for name, value in options.items() for text in (f"--{name}", value)),
    ]


def fit(command: list[str], log: Path) -> int:
    with log.open("w") as file:
        return subprocess.run(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


class Member:
    """A server of the fleet behind a proxy; it can be killed and started again."""

    def __init__(self, model: Path, folder: Path, name: str, delay_s: float = 0.0) -> None:
        self.model, self.folder, self.name, self.starts = model, folder, name, 0
        self._stack = ExitStack()
        self.proxy = Proxy(self._start(), delay_s)

    def _start(self) -> str:
        self.starts += 1
        log = self.folder / f"{self.name}-{self.starts}.log"
        return self._stack.enter_context(sampling_server(self.model, log))

    def kill(self) -> None:
        """SIGKILL to the server and its engine."""
        port = self.proxy.target.rsplit(":", 1)[1]
        for pid in _find_servers(f"--port {port} "):
            os.killpg(os.getpgid(pid), signal.SIGKILL)

    def restart(self) -> None:
        """Start the server with its first weights, under the same URL."""
        self.proxy.has_weights = False
        self.proxy.target = self._start()

    def close(self) -> None:
        self.proxy.close()
        self._stack.close()


def _find_servers(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") + " "
            except OSError:
                continue
            if text in line and "api_server" in line:
                found.append(int(entry.name))
    return found


def cause_failures(members: list[Member], run: Path, stop: threading.Event, failures: list[str]) -> None:
    """Kill the first server in a request of the first round, and the second in the second round; restart it."""

    def in_round(index: int) -> bool:
        folder = run / "rounds" / f"{index:04d}"
        return folder.exists() and "responses" not in _complete_stages(folder)

    for index, member in enumerate(members[:2]):
        while not stop.is_set():
            with member.proxy.change:
                member.proxy.change.wait(0.2)
                if in_round(index) and member.proxy.in_progress > 0:
                    break
        if stop.is_set():
            return
        if index == 1:
            members[2].proxy.gate.clear()  # the round lasts until the restart
        member.kill()
        failures.append(
            f"{member.name} killed with {member.proxy.in_progress} requests in progress in round {index + 1}"
        )
        if index == 1:
            member.restart()
            members[2].proxy.gate.set()
            failures.append(f"{member.name} has restarted with its first weights")


def _complete_stages(folder: Path) -> list[str]:
    try:
        return list(json.loads((folder / "manifest.json").read_text())["stages"])
    except (OSError, ValueError, KeyError):
        return []


def read_responses(run: Path, rounds: int) -> list[list[list[int]]]:
    return [RoundStore(run).round(i).read("responses")["response_tokens"].to_pylist() for i in range(rounds)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = save_llama(folder / "llama")
        rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i + 1}?"} for i in range(rounds * PROMPTS + 4)]
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "reward.py").write_text(REWARD)
        members = [Member(model, folder, f"server-{i}", delay_s=0.5 * (i == 2)) for i in range(3)]
        try:
            return compare(folder, members, rounds)
        finally:
            for member in members:
                member.close()


def compare(folder: Path, members: list[Member], rounds: int) -> int:
    urls = [member.proxy.url for member in members]
    if fit(make_command(folder, folder / "healthy", urls, rounds), folder / "healthy.log"):
        print((folder / "healthy.log").read_text())
        return 1
    for member in members:
        member.proxy.requested.clear()
        member.proxy.completed.clear()
    stop, failures = threading.Event(), []
    thread = threading.Thread(target=cause_failures, args=(members, folder / "failing", stop, failures))
    thread.start()
    started = time.monotonic()
    status = fit(make_command(folder, folder / "failing", urls, rounds), folder / "failing.log")
    stop.set()
    thread.join()
    print("\n".join(failures))
    log = (folder / "failing.log").read_text()
    print("\n".join(line for line in log.splitlines() if "samples no responses" in line or "is back" in line))
    if status:
        print(log[-4000:])
        return 1
    healthy, failing = (read_responses(folder / name, rounds) for name in ("healthy", "failing"))
    weights = [load_file(folder / name / "model" / "model.safetensors") for name in ("healthy", "failing")]
    difference = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    requested, completed = Counter[int](), Counter[int]()
    for member in members:
        requested += member.proxy.requested
        completed += member.proxy.completed
        print(f"{member.name}: requested {member.proxy.requested.total()}, completed {member.proxy.completed.total()}")
    again = sum(count - 1 for seed, count in requested.items() if seed > 1000)
    twice = [
        seed for seed, count in completed.items() if count > 1 and seed > PROMPTS
    ]  # small seeds are those of the self-check
    print(f"{rounds} rounds of {PROMPTS} prompts in {time.monotonic() - started:.0f} s")
    print(f"same responses: {healthy == failing}; weights differ by at most {difference:.1e}")
    stale = sum(member.proxy.stale for member in members)
    print(f"requested again: {again}; completed twice: {len(twice)}; stale: {stale}")
    is_success = (
        healthy == failing and not twice and not stale and difference < 1e-4 and len(failures) == 3 and "is back" in log
    )
    print("success" if is_success else "FAILURE")
    return 0 if is_success else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
