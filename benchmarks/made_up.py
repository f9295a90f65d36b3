"""A round with random responses: seconds and host memory of every stage except sampling, for any size."""

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from benchmarks.common import resident_bytes
from rlhf_pl import RebelModule, RoundDataModule, SamplingConfig
from rlhf_pl.callbacks import DegenerationGuard, RoundCheckpoint, RoundRefresh
from rlhf_pl.cli.rounds import make_overview, make_sample_panels
from rlhf_pl.rollout.base import PromptTokens, Response
from rlhf_pl.rollout.transformers import TransformersSampler
from rlhf_pl.rounds.metrics import first_responses, prompt_ids
from rlhf_pl.store.round_store import Round, RoundStore

WORDS = ("sea", "sky", "hills", "river", "beyond", "dogs", "legs", "eight", "two", "tell", "about", "what", "plus")
STAGES = {
    "responses": "responses (made up, written)",
    "rewards": "score",
    "pairs": "select",
    "logps": "log-probs (tiny model)",
}
Rows = list[tuple[str, float, float]]


class Clock:
    """Records seconds and peak host memory (GiB above the start) between marks."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self._base = resident_bytes()
        self._restart()

    def _restart(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._started = time.monotonic()

    def mark(self, name: str) -> None:
        """Record the work since the last mark as `name`."""
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
        self.rows.append((name, time.monotonic() - self._started, (peak - self._base) / 2**30))
        self._restart()


class MadeUpSampler(TransformersSampler):
    """Returns responses of random tokens, 0.5 to 1.5 times `tokens` long; samples only if log-probs are requested."""

    def __init__(self, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.vocabulary = tokens, vocabulary

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        if prompts[0].logps:
            yield from super().generate(prompts, sampling)
            return
        for index, prompt in enumerate(prompts):
            rng = np.random.default_rng(prompt.seed)
            lengths = rng.integers(self.tokens // 2, self.tokens * 3 // 2, sampling.num_responses, endpoint=True)
            yield index, [Response(rng.integers(6, self.vocabulary, n).tolist(), [], True) for n in lengths]


class TimedDataModule(RoundDataModule):
    """Marks the end of reading and of tokenising the prompts."""

    clock: Clock

    def setup(self, stage: str) -> None:
        self.clock.mark("start of the Trainer")
        super().setup(stage)
        self.clock.mark("tokenise prompts")

    def load_rows(self, source: str, option: str) -> Any:
        prompts = super().load_rows(source, option)
        self.clock.mark("read prompts")
        return prompts


class Marks(L.Callback):
    """Marks hooks by names; placed before or after the measured callback."""

    def __init__(self, clock: Clock, **names: str) -> None:
        self.clock, self.names = clock, names

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._mark("setup")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark("on_train_epoch_start")

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._mark("on_train_batch_end")

    def _mark(self, hook: str) -> None:
        if hook in self.names:
            self.clock.mark(self.names[hook])


def measure(prompts: int, responses: int, tokens: int, run: Callable[..., Any], suffix: str) -> Rows:
    """Rows of a run that is stopped after its first update, and of its continuation with the same command.

    Args:
        prompts: Number of prompts.
        responses: Responses per prompt.
        tokens: Mean tokens per response.
        run: (function, arguments) -> the function's result in a separate process.
        suffix: Format of the prompts' file: `.jsonl` or `.parquet`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # no cached token ids of an earlier measurement
        run(_write_inputs, folder, prompts, tokens, suffix)
        arguments = (folder, responses, tokens, suffix)
        first = run(_fit, *arguments, 1)
        again = [(f"again: {stage}", *rest) for stage, *rest in run(_fit, *arguments, 2)]
        return [*first, *run(_show, folder), *again]


def _write_inputs(folder: Path, prompts: int, tokens: int, suffix: str) -> None:
    from tests.conftest import save_llama

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    save_llama(folder / "model", max_position_embeddings=2 * tokens + 512, **sizes)
    rng = random.Random(0)
    rows = [
        {"prompt_id": str(i), "prompt": f"What is {i}? " + " ".join(rng.choices(WORDS, k=40)), "key": str(i)}
        for i in range(prompts)
    ]
    file = folder / f"prompts{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _fit(folder: Path, responses: int, tokens: int, suffix: str, max_steps: int) -> Rows:
    clock = Clock()
    complete = Round.complete

    def complete_and_mark(stored: Round, stage: str, **info: Any) -> None:
        complete(stored, stage, **info)
        if stage in STAGES:
            clock.mark(STAGES[stage])

    Round.complete = complete_and_mark  # type: ignore[method-assign]
    L.seed_everything(0, verbose=False)
    module = RebelModule(str(folder / "model"))
    refresh = RoundRefresh(
        reward="benchmarks.growth.variety",
        sampler=MadeUpSampler(tokens, module.source.config.vocab_size),
        sampling=SamplingConfig(num_responses=responses, max_response_tokens=tokens * 3 // 2),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        max_steps=max_steps,
        default_root_dir=folder / "run",
        callbacks=[
            refresh,
            Marks(clock, setup="checks at the start", on_train_epoch_start="pairs as training data"),
            DegenerationGuard(),
            Marks(clock, on_train_epoch_start="guard", on_train_batch_end="an update"),
            RoundCheckpoint(),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TimedDataModule(str(folder / f"prompts{suffix}"), batch_size=32, max_prompt_tokens=512)
    data.clock = clock
    last = folder / "run" / "checkpoints" / "last.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None, weights_only=False)
    clock.mark("end")
    return clock.rows


def _show(folder: Path) -> Rows:
    clock = Clock()
    stored = Round(folder / "run" / "rounds" / "0000")
    first_responses(stored, prompt_ids(stored)[::20_000])
    clock.mark("report: first responses")
    make_overview(RoundStore(folder / "run"))
    make_sample_panels(stored, 3)
    clock.mark("rlhf-pl rounds, with 3 samples")
    return clock.rows
