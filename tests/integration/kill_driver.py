"""Runs `rlhf-pl fit` again and again in forked children, some of which are killed at a chosen moment.

    python kill_driver.py PLAN.json

PLAN.json: {"arguments": [...], "runs": [{"dir": ..., "kill": {...} | null, "trace": path | null}, ...]}. The heavy
imports happen once, in the parent, before any thread exists; every child is a new run. The driver prints a JSON line
for each run: its exit statuses, and the seconds between the end of its first rank and the end of its last.

With `"ranks": 4` a run has four processes, set up as torchrun does; its `arguments` must request four devices, and
`"rank"` in its kill selects the rank. `"copy_of"` starts from a copy of another run's directory.

A kill names an event, its count and a delay: `{"event": "write responses", "count": 2, "delay": 0.0}` sends SIGKILL to
the process itself `delay` seconds after the second such event began (from another thread if the delay is not 0), or
the signal under `signal`. With `"since": ["after optimizer step", 6]` counting starts after that event.
"""

import functools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


class Tracer:
    """Counts and records events, and kills the process at the chosen one."""

    def __init__(self, kill: dict[str, Any] | None, trace: str | None) -> None:
        self.kill, self.counts = kill, Counter[str]()
        since = (kill or {}).get("since")
        self.since: tuple[str, int] | None = tuple(since) if since else None
        self.before = Counter[str]()  # events before `since`
        self.file = open(trace, "w") if trace else None  # noqa: SIM115 - open until the process ends

    def record(self, name: str) -> None:
        self.counts[name] += 1
        if self.file:
            self.file.write(json.dumps([time.monotonic(), name, self.counts[name]]) + "\n")
            self.file.flush()
        if self.since is not None:
            if self.since == (name, self.counts[name]):
                self.since, self.before = None, self.counts - Counter([name])
            else:
                return
        if self.kill and (name, self.counts[name] - self.before[name]) == (self.kill["event"], self.kill["count"]):
            kill = functools.partial(kill_self, self.kill.get("signal", signal.SIGKILL))
            if self.kill["delay"] == 0:
                kill()
            else:
                threading.Timer(self.kill["delay"], kill).start()

    def wrap_method(self, owner: Any, method: str, name: Callable[..., str]) -> None:
        """Record an event before and after each call of `owner.method`."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.record(f"before {name(*args)}")
            result = original(*args, **kwargs)
            self.record(f"after {name(*args)}")
            return result

        setattr(owner, method, wrapped)


def instrument(tracer: Tracer) -> None:
    """Record events at every boundary and inside every phase of a run."""
    import torch

    from rlhf_pl.callbacks import HFExport, RoundCheckpoint, SampleTable, hf_export, round_checkpoint
    from rlhf_pl.modules import RebelModule
    from rlhf_pl.rewards import FunctionReward
    from rlhf_pl.rollout import TransformersSampler, VLLMSampler
    from rlhf_pl.rounds.preparation import RoundPreparation
    from rlhf_pl.store.round_store import Round
    from rlhf_pl.utils import disk

    tracer.wrap_method(Round, "write_shard", lambda stored, stage, *_: f"write {stage} of {stored.path.parent.name}")
    tracer.wrap_method(Round, "complete", lambda stored, stage, **_: f"complete {stage} of {stored.path.parent.name}")
    tracer.wrap_method(os, "replace", lambda *_: "rename")
    tracer.wrap_method(disk.os, "fsync", lambda *_: "flush")
    tracer.wrap_method(FunctionReward, "score", lambda *_: "reward call")
    tracer.wrap_method(RebelModule, "training_step", lambda *_: "training step")
    tracer.wrap_method(RebelModule, "validation_step", lambda *_: "validation step")
    tracer.wrap_method(torch.optim.AdamW, "step", lambda *_: "optimizer step")
    tracer.wrap_method(torch, "save", lambda *_: "checkpoint write")
    kinds = {"after": "round", "update": "update"}
    tracer.wrap_method(RoundCheckpoint, "_save", lambda *args: f"{kinds[args[2].split('-')[0]]} checkpoint")
    tracer.wrap_method(RoundCheckpoint, "_remove_old", lambda *_: "removal of checkpoints")
    tracer.wrap_method(round_checkpoint, "link_last", lambda *_: "link to a checkpoint")
    tracer.wrap_method(RoundPreparation, "evaluate", lambda *_: "evaluation")
    tracer.wrap_method(SampleTable, "on_train_epoch_end", lambda *_: "samples")
    tracer.wrap_method(HFExport, "_write", lambda *_: "export")
    tracer.wrap_method(hf_export.shutil, "rmtree", lambda *_: "removal of a folder")
    for sampler in (TransformersSampler, VLLMSampler):
        tracer.wrap_method(sampler, "load_weights", lambda *_: "weight sync")
        original = sampler.generate

        def generate(self: Any, *args: Any, original: Any = original) -> Any:
            tracer.record("before generation")
            for item in original(self, *args):
                tracer.record("responses to a prompt")
                yield item

        sampler.generate = generate  # type: ignore[method-assign]


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_child(arguments: list[str], run: dict[str, Any], rank: int, port: int) -> None:
    ranks = run.get("ranks", 1)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    folder = Path(run["dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(str(folder) + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    kill = run.get("kill")
    tracer = Tracer(kill if kill and kill.get("rank", 0) == rank else None, run.get("trace") if rank == 0 else None)
    instrument(tracer)
    tracer.record("start")
    from rlhf_pl.__main__ import main

    os._exit(
        main(
            [
                *arguments,
                "--trainer.precision",
                "32-true",
                "--trainer.default_root_dir",
                run["dir"],
                *run.get("arguments", []),
            ]
        )
    )


def run_all(plan: dict[str, Any]) -> None:
    import lightning  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import rlhf_pl.cli.fit  # noqa: F401

    for run in plan["runs"]:
        if "copy_of" in run:
            shutil.copytree(run["copy_of"], run["dir"], symlinks=True)
        port, rank_of = find_free_port(), {}
        for rank in range(run.get("ranks", 1)):
            pid = os.fork()
            if pid == 0:
                try:
                    run_child(plan["arguments"], run, rank, port)
                except SystemExit as stop:  # raised by the command line's parser
                    os._exit(stop.code if isinstance(stop.code, int) else 1)
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(99)
            rank_of[pid] = rank
        statuses, first_end = {}, 0.0
        while rank_of:
            pid, status = os.wait()
            first_end = first_end or time.monotonic()
            statuses[rank_of.pop(pid)] = os.waitstatus_to_exitcode(status)
        seconds_after = time.monotonic() - first_end
        every = [statuses[rank] for rank in sorted(statuses)]
        print(
            json.dumps({"dir": run["dir"], "status": every[0], "every": every, "seconds_after": seconds_after}),
            flush=True,
        )


if __name__ == "__main__":
    run_all(json.loads(Path(sys.argv[1]).read_text()))
