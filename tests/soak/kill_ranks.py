"""Kills a rank of a real run of two processes and measures how the other one ends; prints a Markdown table.

    python tests/soak/kill_ranks.py [--launcher torchrun] [--phase generation] [--rank 1] [--watch off] [--limit 90]

Every run is `rlhf-pl fit` of a small random model on two CPU processes (gloo), under Lightning's launcher or under two
torchrun agents on this host. Once both ranks are in the phase, one is killed (`kill -9`). The table has the seconds
until every other process of the run has ended, launchers included, and whether their output names the dead rank.
"""

import argparse
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

LAUNCHERS, PHASES, RANKS, WATCH = ("lightning", "torchrun"), ("generation", "training"), (0, 1), ("on", "off")
START_SECONDS = 240  # until both ranks are in the phase
PACE = {"generation": 5.0, "training": 0.5}  # minimum of seconds for a prompt's responses, or for an update
MIN_ROUND_PROMPTS = 20  # calls with fewer prompts are checks of the sampler
ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    """The end of a run after one of its ranks was killed."""

    seconds: float | None  # until all other processes had ended; None if some lived on
    named: str  # the line that names the dead rank, or an empty string
    codes: list[int | None]  # exit codes of the launchers' processes
    log: str

    def format_row(self, limit: float) -> str:
        ended = f"over {limit:g}" if self.seconds is None else f"{self.seconds:.1f}"
        by = "no" if not self.named else "yes" if self.named.startswith("error: ") else "by torchrun alone"
        return f"{ended} | {by}"


def run_as_rank(arguments: list[str]) -> int:
    """Run `rlhf-pl` in a process of the run, with slow phases that create a file when they begin."""
    folder, phase = Path(os.environ["SOAK_FOLDER"]), os.environ["SOAK_PHASE"]
    import rlhf_pl.distributed.ranks
    from rlhf_pl.__main__ import main
    from rlhf_pl.modules import RebelModule
    from rlhf_pl.rollout import TransformersSampler

    if os.environ["SOAK_WATCH"] == "off":
        rlhf_pl.distributed.ranks.RankWatch = lambda *_: None

    def mark_phase() -> None:
        import torch.distributed as dist

        mark = folder / f"rank-{dist.get_rank()}"
        if dist.is_initialized() and not mark.exists():
            mark.with_suffix(".tmp").write_text(str(os.getpid()))
            mark.with_suffix(".tmp").rename(mark)

    generate, step = TransformersSampler.generate, RebelModule.training_step

    def slow_generate(self, prompts, sampling):
        for found in generate(self, prompts, sampling):
            if phase == "generation" and len(prompts) >= MIN_ROUND_PROMPTS:
                mark_phase()
                time.sleep(PACE[phase])
            yield found

    def slow_step(self, *batch):
        if phase == "training":
            mark_phase()
            time.sleep(PACE[phase])
        return step(self, *batch)

    TransformersSampler.generate = slow_generate
    RebelModule.training_step = slow_step
    return main(arguments)


def make_arguments(folder: Path, launcher: str) -> list[str]:
    """Arguments of `rlhf-pl fit` with 40 prompts per rank and round."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import save_llama

    model = save_llama(folder / "llama")
    rows = "\n".join(f'{{"prompt": "What is {i} plus {i + 1}?"}}' for i in range(80))
    (folder / "prompts.jsonl").write_text(rows)
    (folder / "reward.py").write_text("def score(response):\n    return len(set(response)) / 10\n")
    devices, nodes = (2, 1) if launcher == "lightning" else (1, 2)
    options = {
        **{"model.policy": model, "data.prompts": folder / "prompts.jsonl", "data.max_prompt_tokens": 64},
        **{"data.batch_size": 1, "rollout.reward": f"{folder}/reward.py:score", "rollout.prompts_per_shard": 40},
        **{"rollout.sampler": "TransformersSampler", "rollout.sampler.dtype": "float32"},
        **{"rollout.sampling.max_response_tokens": 8, "rollout.sampling.num_responses": 2},
        **{"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "trainer.devices": devices},
        **{"trainer.num_nodes": nodes, "trainer.strategy": "ddp", "trainer.default_root_dir": folder / "run"},
    }
    return ["fit", *(str(text) for name, value in options.items() for text in (f"--{name}", value))]


def make_commands(launcher: str, arguments: list[str]) -> list[list[str]]:
    """The commands of a user, one terminal for Lightning's launcher and two for torchrun."""
    script = [str(Path(__file__).resolve()), *arguments]
    if launcher == "lightning":
        return [[sys.executable, *script]]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "soak"]
    agent += ["--local-addr", "127.0.0.1", "--rdzv-conf"]
    # the first node hosts the rendezvous, as usual: its agent has the lower process id, and so rank 0
    return [[*agent, f"is_host={host}", *script] for host in ("true", "false")]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def find_report(log: str, rank: int) -> str:
    """Find the line that reports the death of a rank: ours, or torchrun's report of its worker."""
    ours = re.search(rf"^error: .*\brank {rank}\b.*(?:died|lost).*$", log, re.MULTILINE)
    torchruns = re.search(rf"^.*\brank *: {rank} \(local_rank: .*$", log, re.MULTILINE)
    found = ours or torchruns
    return found.group().strip() if found else ""


def kill_one(folder: Path, launcher: str, phase: str, rank: int, watch: str, limit: float = 90.0) -> Outcome:
    """Start a run in a folder, kill a rank in a phase, wait for the others."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"SOAK_FOLDER": str(folder), "SOAK_PHASE": phase, "SOAK_WATCH": watch}
    environment |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    with log.open("w") as file:
        launched = [
            subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
            for command in make_commands(launcher, make_arguments(folder, launcher))
        ]
    try:
        marks = [folder / f"rank-{r}" for r in RANKS]
        deadline = time.monotonic() + START_SECONDS
        while not all(mark.exists() for mark in marks):
            if time.monotonic() > deadline or any(p.poll() is not None for p in launched):
                raise RuntimeError(f"The run did not reach {phase}:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        pids = [int(mark.read_text()) for mark in marks]
        time.sleep(1.0)
        os.kill(pids[rank], signal.SIGKILL)
        killed, seconds = time.monotonic(), None
        while seconds is None and time.monotonic() < killed + limit:
            if all(p.poll() is not None for p in launched) and not any(map(is_alive, pids)):
                seconds = time.monotonic() - killed
            time.sleep(0.05)
    finally:
        for process in launched:  # each has a session of its own: kill the processes that are left
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        codes = [process.wait() for process in launched]
    text = log.read_text()
    return Outcome(seconds, find_report(text, rank), [*codes], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", choices=LAUNCHERS, help="both by default")
    parser.add_argument("--phase", choices=PHASES, help="both by default")
    parser.add_argument("--rank", type=int, choices=RANKS, help="both by default")
    parser.add_argument("--watch", choices=WATCH, help="both by default")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds to wait for the others (%(default)g)")
    parser.add_argument("--logs", type=Path, help="folder to keep every run's output in")
    chosen = parser.parse_args()
    print("| launcher | phase | killed | watch | others ended after, s | rank named |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for launcher, phase, rank, watch in itertools.product(LAUNCHERS, PHASES, RANKS, WATCH):
        wanted = (chosen.launcher, chosen.phase, chosen.rank, chosen.watch)
        if any(w is not None and w != x for w, x in zip(wanted, (launcher, phase, rank, watch), strict=True)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = kill_one(Path(folder), launcher, phase, rank, watch, chosen.limit)
        if chosen.logs is not None:
            chosen.logs.mkdir(parents=True, exist_ok=True)
            (chosen.logs / f"{launcher}-{phase}-{rank}-{watch}.log").write_text(outcome.log)
        print(f"| {launcher} | {phase} | rank {rank} | {watch} | {outcome.format_row(chosen.limit)} |", flush=True)


if __name__ == "__main__":
    if "SOAK_FOLDER" in os.environ:
        sys.exit(run_as_rank(sys.argv[1:]))
    main()
