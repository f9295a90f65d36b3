"""Tries Lightning's callbacks, plugins, profilers, loggers and options on tiny runs; prints a table.

    python scripts/lightning_options.py MODEL [NAME ...]

MODEL is a small policy, such as `models/SmolLM2-135M-Instruct`; a random one of two layers is quicker. Each case runs a
command, and the same command again on the finished run, which must leave the exported model as it is. The table says
`works`, `refused` (with an error that names the option) or `unknown` (it failed otherwise, or needs what is not here).
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

CB, PL = "--trainer.callbacks", "--trainer.plugins"
_MONITOR = ["--trainer.callbacks.monitor", "train/loss"]
CASES: dict[str, list[str]] = {
    "EarlyStopping": [CB, "EarlyStopping", *_MONITOR],
    "ModelCheckpoint": [CB, "ModelCheckpoint", "--trainer.callbacks.monitor", "rollout/reward_mean"],
    "OnExceptionCheckpoint": [CB, "OnExceptionCheckpoint", "--trainer.callbacks.dirpath", "exceptions"],
    "EMAWeightAveraging": [CB, "EMAWeightAveraging", "--trainer.callbacks.decay", "0.9"],
    "WeightAveraging": [CB, "WeightAveraging"],
    "StochasticWeightAveraging": [CB, "StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "1e-3"],
    "LearningRateMonitor": [CB, "LearningRateMonitor"],
    "LearningRateFinder": [CB, "LearningRateFinder"],
    "BatchSizeFinder": [CB, "BatchSizeFinder"],
    "GradientAccumulationScheduler": [CB, "GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{0: 2}"],
    "BackboneFinetuning": [CB, "BackboneFinetuning"],
    "ModelPruning": [CB, "ModelPruning", "--trainer.callbacks.pruning_fn", "l1_unstructured"],
    "DeviceStatsMonitor": [CB, "DeviceStatsMonitor"],
    "ThroughputMonitor": [CB, "ThroughputMonitor", "--trainer.callbacks.batch_size_fn", "builtins.len"],
    "Timer": [CB, "Timer", "--trainer.callbacks.duration", "00:01:00:00", "--trainer.callbacks.interval", "step"],
    "LambdaCallback": [CB, "LambdaCallback"],
    "ModelSummary": [CB, "ModelSummary"],
    "RichModelSummary": [CB, "RichModelSummary"],
    "RichProgressBar": [CB, "RichProgressBar"],
    "TQDMProgressBar": [CB, "TQDMProgressBar"],
    "ReduceLROnPlateau": [
        *("--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau"),
        *("--model.lr_scheduler.monitor", "train/loss"),
    ],
    "StepLR": ["--model.lr_scheduler", "torch.optim.lr_scheduler.StepLR", "--model.lr_scheduler.step_size", "2"],
    "AsyncCheckpointIO": [PL, "AsyncCheckpointIO"],
    "TorchCheckpointIO": [PL, "TorchCheckpointIO"],
    "BitsandbytesPrecision": [PL, "BitsandbytesPrecision", "--trainer.plugins.mode", "nf4"],
    "DoublePrecision": [PL, "DoublePrecision"],
    "HalfPrecision": [PL, "HalfPrecision"],
    "SimpleProfiler": ["--trainer.profiler", "simple"],
    "AdvancedProfiler": ["--trainer.profiler", "advanced"],
    "PyTorchProfiler": ["--trainer.profiler", "pytorch"],
    "CSVLogger": ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"],
    "TensorBoardLogger": ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "logs"],
    "WandbLogger": ["--trainer.logger", "WandbLogger"],
    "max_steps": ["--trainer.max_steps", "3"],
    "max_time": ["--trainer.max_time", "00:01:00:00"],
    "min_steps": ["--trainer.min_steps", "2"],
    "min_epochs": ["--trainer.min_epochs", "1"],
    "limit_train_batches 2": ["--trainer.limit_train_batches", "2"],
    "limit_train_batches 0.5": ["--trainer.limit_train_batches", "0.5"],
    "limit_train_batches 0": ["--trainer.limit_train_batches", "0"],
    "limit_val_batches": ["--trainer.limit_val_batches", "1"],
    "fast_dev_run": ["--trainer.fast_dev_run", "true"],
    "overfit_batches": ["--trainer.overfit_batches", "2"],
    "val_check_interval 0.5": ["--trainer.val_check_interval", "0.5"],
    "val_check_interval 2": ["--trainer.val_check_interval", "2"],
    "check_val_every_n_epoch": ["--trainer.check_val_every_n_epoch", "2"],
    "num_sanity_val_steps": ["--trainer.num_sanity_val_steps", "2"],
    "reload_dataloaders_every_n_epochs": ["--trainer.reload_dataloaders_every_n_epochs", "2"],
    "inference_mode false": ["--trainer.inference_mode", "false"],
    "detect_anomaly": ["--trainer.detect_anomaly", "true"],
    "accumulate_grad_batches": ["--trainer.accumulate_grad_batches", "2"],
    "gradient_clip_val": ["--trainer.gradient_clip_val", "0.5"],
    "gradient_clip_algorithm value": [
        *("--trainer.gradient_clip_val", "0.5"),
        *("--trainer.gradient_clip_algorithm", "value"),
    ],
    "sync_batchnorm": ["--trainer.sync_batchnorm", "true"],
    "use_distributed_sampler": ["--trainer.use_distributed_sampler", "true"],
    "barebones": ["--trainer.barebones", "true"],
    "enable_checkpointing false": ["--trainer.enable_checkpointing", "false"],
    "deterministic": ["--trainer.deterministic", "true"],
    "precision bf16-mixed": ["--trainer.precision", "bf16-mixed"],
    "precision 16-true": ["--trainer.precision", "16-true"],
    "precision 64-true": ["--trainer.precision", "64-true"],
    "enable_model_summary": ["--trainer.enable_model_summary", "true"],
}
REWARD = "def score(response: str) -> float:\n    return float(sum(map(ord, response)) % 17)\n"


def main(model: str, names: list[str]) -> None:
    """Run the cases, or those of these names, and print a row for each."""
    policy = os.path.abspath(model)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sys.path.insert(0, folder)
        Path("tiny_reward.py").write_text(REWARD)
        rows = [json.dumps({"prompt": f"say {i}"}) for i in range(20)]
        Path("prompts.jsonl").write_text("\n".join(rows))
        print("| option | outcome | what it says |\n| --- | --- | --- |")
        for name in names or CASES:
            outcome, note = _outcome(name, policy)
            print(f"| `{name}` | {outcome} | {note} |", flush=True)


def _outcome(name: str, policy: str) -> tuple[str, str]:
    run_dir = f"run-{len(list(Path().iterdir()))}"
    arguments = [
        *("fit", "--model.policy", policy, "--data.prompts", "prompts.jsonl", "--data.val_prompts", "4"),
        *(
            "--data.max_prompt_tokens",
            "128",
            "--data.batch_size",
            "2",
            "--rollout.reward",
            "tiny_reward.score",
            "--rollout.sampler",
            "TransformersSampler",
        ),
        *("--rollout.sampling.num_responses", "2", "--rollout.sampling.max_response_tokens", "6"),
        *("--rollout.val_num_responses", "2", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
        *("--trainer.enable_progress_bar", "true" if "ProgressBar" in name else "false"),
        *("--trainer.default_root_dir", run_dir, *CASES[name]),
    ]
    code, said = _run(arguments)
    if code != 0:
        why = next((line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")), "")
        named = name.split()[0].removesuffix("-mixed") in why or CASES[name][0].lstrip("-") in why
        refused = named and not (Path(run_dir) / "rounds").exists()
        return ("refused", why) if refused else ("unknown", (why or said.strip().splitlines()[-1])[:160])
    before = _model(run_dir)
    code, said = _run(arguments)
    if code != 0:
        return "unknown", f"the second start fails: {said.strip().splitlines()[-1][:120]}"
    if before != _model(run_dir) and not name.startswith(("limit_train", "enable_checkpointing")):
        return "unknown", "the second start changes the exported model"
    return "works", ""


def _run(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what was printed) of a command in this process."""
    from rlhf_pl.__main__ import main as command

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return command(arguments), said.getvalue()
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
        except Exception as error:
            return 1, f"{said.getvalue()}\n{type(error).__name__}: {error}"


def _model(run_dir: str) -> str:
    return hashlib.sha256((Path(run_dir) / "model" / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    start = time.monotonic()
    main(sys.argv[1], sys.argv[2:])
    print(f"{time.monotonic() - start:.0f} seconds", file=sys.stderr)
