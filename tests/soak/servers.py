"""Three `vllm serve` of which one is killed in mid-request, one comes back with its first weights, and one is slow.

    python -m tests.soak.servers [--rounds 4]

A run on a healthy fleet comes first, then the same run on one that suffers. It holds if both end with the same answers
and weights, if every prompt's answers are in the round once, if no prompt that was answered was asked again, and if
the servers' counts tell of the losses.
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
PROMPTS = 24  # of a round


def fit_command(folder: Path, run: Path, urls: list[str], rounds: int) -> list[str]:
    """The run, with two prompts at a time at each server, so that others wait."""
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
        for pid in _processes(f"--port {port} "):
            os.killpg(os.getpgid(pid), signal.SIGKILL)

    def start_again(self) -> None:
        """With its first weights, under the same URL."""
        self.proxy.has_weights = False
        self.proxy.target = self._start()

    def close(self) -> None:
        self.proxy.close()
        self._stack.close()


def _processes(text: str) -> list[int]:
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


def suffer(members: list[Member], run: Path, stop: threading.Event, told: list[str]) -> None:
    """Kill the first server while it works in the first round, and the second, which comes back, in the second."""

    def in_round(index: int) -> bool:
        folder = run / "rounds" / f"{index:04d}"
        return folder.exists() and "responses" not in _complete(folder)

    for index, member in enumerate(members[:2]):
        while not stop.is_set():
            with member.proxy.change:
                member.proxy.change.wait(0.2)
                if in_round(index) and member.proxy.under_way > 0:
                    break
        if stop.is_set():
            return
        if index == 1:
            members[2].proxy.gate.clear()  # the round takes until that server is there again
        member.kill()
        told.append(f"{member.name} killed with {member.proxy.under_way} requests under way in round {index + 1}")
        if index == 1:
            member.start_again()
            members[2].proxy.gate.set()
            told.append(f"{member.name} is there again with its first weights")


def _complete(folder: Path) -> list[str]:
    try:
        return list(json.loads((folder / "manifest.json").read_text())["stages"])
    except (OSError, ValueError, KeyError):
        return []


def responses(run: Path, rounds: int) -> list[list[list[int]]]:
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
    if fit(fit_command(folder, folder / "healthy", urls, rounds), folder / "healthy.log"):
        print((folder / "healthy.log").read_text())
        return 1
    for member in members:
        member.proxy.asked.clear()
        member.proxy.answered.clear()
    stop, told = threading.Event(), []
    hand = threading.Thread(target=suffer, args=(members, folder / "suffering", stop, told))
    hand.start()
    started = time.monotonic()
    status = fit(fit_command(folder, folder / "suffering", urls, rounds), folder / "suffering.log")
    stop.set()
    hand.join()
    print("\n".join(told))
    log = (folder / "suffering.log").read_text()
    print("\n".join(line for line in log.splitlines() if "draws no answers" in line or "is back" in line))
    if status:
        print(log[-4000:])
        return 1
    healthy, suffering = (responses(folder / name, rounds) for name in ("healthy", "suffering"))
    weights = [load_file(folder / name / "model" / "model.safetensors") for name in ("healthy", "suffering")]
    off = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    asked, answered = Counter[int](), Counter[int]()
    for member in members:
        asked += member.proxy.asked
        answered += member.proxy.answered
        print(f"{member.name}: asked {member.proxy.asked.total()}, answered {member.proxy.answered.total()}")
    again = sum(count - 1 for seed, count in asked.items() if seed > 1000)
    twice = [
        seed for seed, count in answered.items() if count > 1 and seed > PROMPTS
    ]  # small ones are the self-check's
    print(f"{rounds} rounds of {PROMPTS} prompts in {time.monotonic() - started:.0f} s")
    print(f"same answers: {healthy == suffering}; weights differ by {off:.1e} at most")
    stale = sum(member.proxy.stale for member in members)
    print(f"asked again because a server was lost: {again}; answered twice: {len(twice)}; with old weights: {stale}")
    held = healthy == suffering and not twice and not stale and off < 1e-4 and len(told) == 3 and "is back" in log
    print("holds" if held else "DOES NOT HOLD")
    return 0 if held else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
