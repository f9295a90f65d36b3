"""Runs `rlhf-pl fit` again and again in forked children, some of which are killed at a chosen moment.

    python kill_driver.py PLAN.json

PLAN.json: {"arguments": [...], "runs": [{"dir": ..., "kill": {...} | null, "trace": path | null}, ...]}. The heavy
imports happen once, in the parent, before any thread exists; every child is a fresh run. A run's exit status goes to
standard output, a JSON line each, with the seconds that it lived on after its first rank had ended.

With `"ranks": 4` a run has four processes, set up as torchrun does; its `arguments` must ask for as many devices, and
`"rank"` in its kill says which one dies. `"copy_of"` begins with a copy of another run's directory.

A kill names an event, its count and when: `{"event": "write responses", "count": 2, "delay": 0.0}` sends SIGKILL to
the process itself `delay` seconds after the second such event began (from another thread if the delay is not 0), or
the signal under `signal`. With `"since": ["after optimizer step", 6]` events count from that one on.
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


def die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


class Tracer:
    """Counts events, notes when they happen, and kills at the chosen one."""

    def __init__(self, kill: dict[str, Any] | None, trace: str | None) -> None:
        self.kill, self.counts = kill, Counter[str]()
        since = (kill or {}).get("since")
        self.since: tuple[str, int] | None = tuple(since) if since else None
        self.before = Counter[str]()  # events that don't count
        self.file = open(trace, "w") if trace else None  # noqa: SIM115 - open as long as the process lives

    def event(self, name: str) -> None:
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
            die_so = functools.partial(die, self.kill.get("signal", signal.SIGKILL))
            if self.kill["delay"] == 0:
                die_so()
            else:
                threading.Timer(self.kill["delay"], die_so).start()

    def around(self, owner: Any, method: str, name: Callable[..., str]) -> None:
        """Have `owner.method` report before and after it runs."""
        plain = getattr(owner, method)

        @functools.wraps(plain)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.event(f"before {name(*args)}")
            result = plain(*args, **kwargs)
            self.event(f"after {name(*args)}")
            return result

        setattr(owner, method, wrapped)


def instrument(tracer: Tracer) -> None:
    """Report at every boundary and inside every phase of a run."""
    import torch

    from rlhf_pl.callbacks import HFExport, RoundCheckpoint, SampleTable, hf_export, round_checkpoint
    from rlhf_pl.modules import RebelModule
    from rlhf_pl.rewards import FunctionReward
    from rlhf_pl.rollout import TransformersSampler, VLLMSampler
    from rlhf_pl.rounds.preparation import RoundPreparation
    from rlhf_pl.store.round_store import Round
    from rlhf_pl.utils import disk

    tracer.around(Round, "write_shard", lambda stored, stage, *_: f"write {stage} of {stored.path.parent.name}")
    tracer.around(Round, "complete", lambda stored, stage, **_: f"complete {stage} of {stored.path.parent.name}")
    tracer.around(os, "replace", lambda *_: "rename")
    tracer.around(disk.os, "fsync", lambda *_: "flush")
    tracer.around(FunctionReward, "score", lambda *_: "reward call")
    tracer.around(RebelModule, "training_step", lambda *_: "training step")
    tracer.around(RebelModule, "validation_step", lambda *_: "validation step")
    tracer.around(torch.optim.AdamW, "step", lambda *_: "optimizer step")
    tracer.around(torch, "save", lambda *_: "checkpoint write")
    kinds = {"after": "round", "update": "update"}
    tracer.around(RoundCheckpoint, "_save", lambda *args: f"{kinds[args[2].split('-')[0]]} checkpoint")
    tracer.around(RoundCheckpoint, "_remove_old", lambda *_: "removal of checkpoints")
    tracer.around(round_checkpoint, "link_last", lambda *_: "link to a checkpoint")
    tracer.around(RoundPreparation, "evaluate", lambda *_: "evaluation")
    tracer.around(SampleTable, "on_train_epoch_end", lambda *_: "samples")
    tracer.around(HFExport, "_write", lambda *_: "export")
    tracer.around(hf_export.shutil, "rmtree", lambda *_: "removal of a folder")
    for sampler in (TransformersSampler, VLLMSampler):
        tracer.around(sampler, "load_weights", lambda *_: "weight sync")
        plain = sampler.generate

        def generate(self: Any, *args: Any, plain: Any = plain) -> Any:
            tracer.event("before draw")
            for item in plain(self, *args):
                tracer.event("answers to a prompt")
                yield item

        sampler.generate = generate  # type: ignore[method-assign]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child(arguments: list[str], run: dict[str, Any], rank: int, port: int) -> None:
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
    tracer.event("start")
    from rlhf_pl.__main__ import main

    os._exit(main([*arguments, "--trainer.default_root_dir", run["dir"], *run.get("arguments", [])]))


def run_all(plan: dict[str, Any]) -> None:
    import lightning  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import rlhf_pl.cli.fit  # noqa: F401

    for run in plan["runs"]:
        if "copy_of" in run:
            shutil.copytree(run["copy_of"], run["dir"], symlinks=True)
        port, rank_of = free_port(), {}
        for rank in range(run.get("ranks", 1)):
            pid = os.fork()
            if pid == 0:
                try:
                    child(plan["arguments"], run, rank, port)
                except SystemExit as stop:  # of the command line's parser
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
        lived_on = time.monotonic() - first_end
        every = [statuses[rank] for rank in sorted(statuses)]
        print(json.dumps({"dir": run["dir"], "status": every[0], "every": every, "lived_on": lived_on}), flush=True)


if __name__ == "__main__":
    run_all(json.loads(Path(sys.argv[1]).read_text()))
