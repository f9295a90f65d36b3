"""One run: a policy trains for a number of rounds, and is evaluated on the held-out prompts in between."""

import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.algorithms.held_out import HeldOut
from benchmarks.algorithms.tasks import Files, Task
from benchmarks.algorithms.variants import ALL, make_module

Curve = list[dict[str, float]]  # numbers of each evaluation; the first is that of the start


class Clock(L.Callback):
    """Evaluates the policy before the first round and after rounds; measures CPU seconds without the evaluations.

    CPU seconds are those of all threads of this process: sampling, scoring and training. Another process on the
    machine changes them little.
    """

    def __init__(self, task: Task, held_out: HeldOut) -> None:
        self.task, self.held_out = task, held_out
        self.rounds, self.started = 0, 0.0
        self.curve: Curve = []

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self.started = time.process_time()
        self._add(module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self.rounds += 1
        if self.rounds % self.task.every == 0 or self.rounds == self.task.rounds:
            self._add(module)

    def _add(self, module: Any) -> None:
        stopped = time.process_time()
        samples = self.rounds * self.task.prompts * self.task.responses
        found = self.held_out.evaluate(module.policy.lm.state_dict())
        self.curve.append({"samples": samples, "seconds": stopped - self.started, **found})
        self.started += time.process_time() - stopped


def train(task: Task, files: Files, algorithm: str, rate: float, seed: int) -> Curve:
    """Train a policy by an algorithm; returns its evaluations."""
    from torch.optim.lr_scheduler import ConstantLR

    from rlhf_pl import RoundDataModule, SamplingConfig, TransformersSampler
    from rlhf_pl.callbacks import RoundRefresh
    from rlhf_pl.optim import AdamW

    variant = ALL[algorithm]
    clock = Clock(task, HeldOut(task, files.model, files.held_out))
    L.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        refresh = RoundRefresh(
            reward=task.reward,
            sampler=TransformersSampler("bfloat16" if task.bfloat16 else "float32"),
            sampling=SamplingConfig(task.responses, task.temperature, max_response_tokens=task.max_tokens),
            selector=None if variant.selector is None else variant.selector(),
        )
        trainer = L.Trainer(
            accelerator="cpu",
            precision="bf16-mixed" if task.bfloat16 else "32-true",
            max_epochs=task.rounds,
            default_root_dir=Path(folder),
            callbacks=[refresh, clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = make_module(
            variant,
            str(files.model),
            task.eta,
            optimizer=lambda p: AdamW(p, lr=rate),
            lr_scheduler=lambda o: ConstantLR(o, 1.0),
        )
        data = RoundDataModule(
            str(files.train), prompts_per_round=task.prompts, batch_size=task.update, max_val_pairs=0, seed=seed
        )
        trainer.fit(module, datamodule=data)
    return clock.curve
