"""One trial: a short run with given settings, evaluated on held-out prompts."""

import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.defaults.tasks import TASKS, save_prompts


@dataclass(frozen=True)
class Trial:
    """Settings of a run; rates are peak rates, `spread` is REBEL's target in nats."""

    task: str
    model: str
    lr: float | str = "auto"
    selector: str = "BestWorst"
    spread: float = 2.0
    responses: int = 4
    precision: str = "bf16-mixed"
    seed: int = 1
    rounds: int = 3
    prompts_per_round: int | None = None
    batch: int = 4
    warmup: float = 0.1
    min_factor: float = 0.0
    temperature: float = 1.0
    tokens: int | None = None  # maximum of a response, instead of the task's
    lora: bool = False


def run(trial: Trial) -> dict[str, Any]:
    """Train; returns the settings, the held-out reward before and after each round, its gain and the KL of rounds."""
    import rlhf_pl
    from rlhf_pl import LoRA, RebelLoss, RebelModule, RoundDataModule, SamplingConfig, TransformersSampler
    from rlhf_pl.callbacks import RoundRefresh
    from rlhf_pl.optim import AdamW, WarmupCosine
    from rlhf_pl.rounds.metrics import first_responses, held_out_metrics, policy_kl, prompt_ids
    from rlhf_pl.store.round_store import RoundStore

    task, started = TASKS[trial.task], time.perf_counter()
    on_gpu = torch.cuda.is_available()
    dtype: Any = "float32" if trial.precision == "32-true" else "bfloat16"
    L.seed_everything(trial.seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = save_prompts(task, Path(folder))
        refresh = RoundRefresh(
            reward=task.reward,
            sampler=TransformersSampler(dtype, 512 if on_gpu else 64),
            sampling=SamplingConfig(
                trial.responses, trial.temperature, max_response_tokens=trial.tokens or task.tokens
            ),
            selector=getattr(rlhf_pl, trial.selector)(),
            val_num_responses=2,
        )
        module = RebelModule(
            trial.model,
            loss=RebelLoss("auto", target_spread=trial.spread),
            optimizer=lambda p: AdamW(p, lr=trial.lr),  # type: ignore[arg-type]
            lr_scheduler=lambda o: WarmupCosine(o, trial.warmup, trial.min_factor),
            lora=LoRA() if trial.lora else None,
        )
        data = RoundDataModule(
            str(train),
            val_prompts=str(held_out),
            prompts_per_round=trial.prompts_per_round,
            batch_size=trial.batch,
            max_val_pairs=0,
            seed=trial.seed,
        )
        trainer = L.Trainer(
            max_epochs=trial.rounds,
            precision=trial.precision,  # type: ignore[arg-type]
            default_root_dir=folder,
            callbacks=[refresh],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data)
        store = RoundStore(folder)
        last = held_out_metrics(store, trial.rounds)
        shown = prompt_ids(store.held_out(0))[:3]
        return {
            **asdict(trial),
            "lr": module.suitable_rate if trial.lr == "auto" else trial.lr,
            "reward": [store.held_out(v).info("rewards")["mean"] for v in range(trial.rounds + 1)],
            "gain": last["val/reward_gain"],
            "error": last["val/reward_gain_se"],
            "kl": [policy_kl(store.held_out(v + 1)).get("new_old") for v in range(trial.rounds)],
            "samples": [row["response"] for row in first_responses(store.held_out(trial.rounds), shown).values()],
            "seconds": time.perf_counter() - started,
        }


def run_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`run` of settings as plain values; a failure is part of the result."""
    warnings.filterwarnings("ignore")
    try:
        return run(Trial(**settings))
    except Exception:
        return {**settings, "failed": traceback.format_exc()[-600:]}
