"""Tries Lightning's callbacks, plugins, profilers, loggers and options in tiny runs, and prints a table.

    python scripts/lightning_options.py MODEL [NAME ...]

MODEL is a small policy, such as `models/SmolLM2-135M-Instruct`; a random one with two layers is faster. Each case runs
a command, and then the same command again on the finished run, which must not change the exported model. Outcomes are
`works`, `refused` (with an error that names the option) and `unknown` (another failure, or a missing package).
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
    """Run all cases, or those with the given names, and print a row for each."""
    policy = os.path.abspath(model)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sys.path.insert(0, folder)
        Path("tiny_reward.py").write_text(REWARD)
        rows = [json.dumps({"prompt": f"say {i}"}) for i in range(20)]
        Path("prompts.jsonl").write_text("\n".join(rows))
        print("| option | outcome | message |\n| --- | --- | --- |")
        for name in names or CASES:
            outcome, note = _try_case(name, policy)
            print(f"| `{name}` | {outcome} | {note} |", flush=True)


def _try_case(name: str, policy: str) -> tuple[str, str]:
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
    code, output = _run(arguments)
    if code != 0:
        lines = output.splitlines()
        message = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
        is_named = name.split()[0].removesuffix("-mixed") in message or CASES[name][0].lstrip("-") in message
        is_refused = is_named and not (Path(run_dir) / "rounds").exists()
        return ("refused", message) if is_refused else ("unknown", (message or output.strip().splitlines()[-1])[:160])
    before = _hash_model(run_dir)
    code, output = _run(arguments)
    if code != 0:
        return "unknown", f"the second start fails: {output.strip().splitlines()[-1][:120]}"
    if before != _hash_model(run_dir) and not name.startswith(("limit_train", "enable_checkpointing")):
        return "unknown", "the second start changes the exported model"
    return "works", ""


def _run(arguments: list[str]) -> tuple[int, str]:
    """Exit code and messages of a command that runs in this process."""
    from rlhf_pl.__main__ import main as command

    messages = io.StringIO()
    with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(io.StringIO()):
        try:
            return command(arguments), messages.getvalue()
        except SystemExit as stop:
            return int(stop.code or 0), messages.getvalue()
        except Exception as error:
            return 1, f"{messages.getvalue()}\n{type(error).__name__}: {error}"


def _hash_model(run_dir: str) -> str:
    return hashlib.sha256((Path(run_dir) / "model" / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    start = time.monotonic()
    main(sys.argv[1], sys.argv[2:])
    print(f"{time.monotonic() - start:.0f} seconds", file=sys.stderr)
