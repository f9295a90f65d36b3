"""Held-out reward over wall-clock time: ours, and TRL's OnlineDPO and GRPO, from the same model on the same task.

The task is the quickstart's. Every run trains for `--seconds` (including the engine's start, but not model loading) in
float32. Afterwards, snapshots of the policy respond to the held-out prompts, with the same sampler and seeds.

    python -m benchmarks.reward_over_time --plot reward_over_time.png
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, describe_machine, format_table, make_parser, run_in_process
from examples.short_answer import score

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
VARIANTS = {"rlhf-pl": "rlhf-pl", "online-dpo": "TRL OnlineDPO", "grpo": "TRL GRPO"}
LEARNING_RATES = {"rlhf-pl": 2e-4, "online-dpo": 6e-5, "grpo": 1e-4}  # the best of the tested rates, see the README
HELD_OUT = 48
Curve = list[tuple[float, float]]  # seconds of training, held-out reward


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--plot", help="a .png file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; the next runs use the next seeds")
    parser.add_argument("--lr", type=float, help="default: each variant's own")
    parser.add_argument("--eta", type=float, default=10.0, help="eta of rlhf-pl, nats per reward unit")
    args = parser.parse_args()
    print(describe_machine())
    print(f"{args.seconds:g} s of training, {args.seeds} seeds, {HELD_OUT} held-out prompts\n")
    curves: dict[str, list[Curve]] = {name: [] for name in args.variant or VARIANTS}
    for seed in range(args.seed, args.seed + args.seeds):
        for name, runs in curves.items():
            runs.append(run_in_process(measure, args, name, seed))
    rows = []
    for name, runs in curves.items():
        points = "; ".join(" ".join(f"{t:.0f}s:{r:.3f}" for t, r in run) for run in runs)
        rows.append([VARIANTS[name], f"{sum(run[-1][1] for run in runs) / len(runs):.3f}", points])
    print(format_table(["", "mean reward at the end", "each seed's curve"], rows))
    if args.plot:
        plot(curves, args.plot)


def plot(curves: dict[str, list[Curve]], file: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for number, (name, runs) in enumerate(curves.items()):
        for run in runs:
            label = VARIANTS[name] if run is runs[0] else None
            axes.plot(*zip(*run, strict=True), color=f"C{number}", marker="o", markersize=3, label=label)
    axes.set(xlabel="seconds of training", ylabel="held-out reward")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def read_prompts() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows for training, and the held-out rows."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def measure(args: argparse.Namespace, variant: str, seed: int) -> Curve:
    train = train_with_lightning if variant == "rlhf-pl" else train_with_trl
    return evaluate(args, train(args, variant, seed))


class Snapshots:
    """Copies of the policy, with the seconds of training before each."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.taken: list[tuple[float, dict[str, Any]]] = []

    def take_if_due(self, model: Any, limit: float) -> bool:
        """Take a snapshot every fifth of the time limit; returns whether the time is over."""
        seconds = time.monotonic() - self.started
        if seconds > min(limit, self.taken[-1][0] + limit / 5):
            self.take(model)
        return seconds > limit

    def take(self, model: Any) -> None:
        seconds = time.monotonic() - self.started
        self.taken.append((seconds, {n: t.detach().bfloat16().clone() for n, t in model.state_dict().items()}))
        self.started += time.monotonic() - self.started - seconds  # excludes the time of the copy


def train_with_lightning(args: argparse.Namespace, variant: str, seed: int) -> list[tuple[float, dict[str, Any]]]:
    import lightning as L
    from torch.optim.lr_scheduler import ConstantLR

    from rlhf_pl import RebelLoss, RebelModule, RoundDataModule, SamplingConfig, VLLMSampler
    from rlhf_pl.algorithms.reward_shaping import RewardShaping
    from rlhf_pl.callbacks import RoundRefresh
    from rlhf_pl.optim import AdamW

    snapshots: list[Snapshots] = []

    class Clock(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
            snapshots.append(Snapshots())
            snapshots[0].take(module.policy.lm)

        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            trainer.should_stop = snapshots[0].take_if_due(module.policy.lm, args.seconds)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_prompts()[0]))
        L.seed_everything(seed, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1000,
            default_root_dir=folder / "run",
            callbacks=[
                RoundRefresh(
                    reward="examples.short_answer.score",
                    sampler=VLLMSampler(dtype="float32"),
                    sampling=SamplingConfig(num_responses=4, temperature=0.8, max_response_tokens=args.max_tokens),
                    shaping=RewardShaping(normalize="prompt"),  # as GRPO does
                ),
                Clock(),
            ],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = RebelModule(
            args.model,
            loss=RebelLoss(args.eta),
            optimizer=lambda p: AdamW(p, lr=args.lr or LEARNING_RATES[variant]),
            lr_scheduler=lambda o: ConstantLR(o, 1.0),
        )
        data = RoundDataModule(
            str(folder / "prompts.jsonl"), prompts_per_round=4, val_prompts=0, batch_size=4, seed=seed
        )
        trainer.fit(module, datamodule=data)
    return snapshots[0].taken


def train_with_trl(args: argparse.Namespace, variant: str, seed: int) -> list[tuple[float, dict[str, Any]]]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    snapshots: list[Snapshots] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **kwargs: Any) -> None:
            snapshots.append(Snapshots())
            snapshots[0].take(kwargs["model"])

        def on_step_end(self, arguments: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = snapshots[0].take_if_due(kwargs["model"], args.seconds)

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        texts = [(p[-1]["content"], c if isinstance(c, str) else c[-1]["content"]) for p, c in pairs]
        limit = args.max_tokens
        return [score(prompt, text, len(tokenizer(text)["input_ids"]) < limit) for prompt, text in texts]

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in read_prompts()[0]]
    settings: dict[str, Any] = {
        "max_steps": 10_000,
        "temperature": 0.8,
        "learning_rate": args.lr or LEARNING_RATES[variant],
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        common = {
            "reward_funcs": reward,
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
            "callbacks": [Clock()],
        }
        trainer: Any
        if variant == "grpo":
            from trl import GRPOConfig, GRPOTrainer

            grpo = GRPOConfig(
                folder,
                per_device_train_batch_size=16,
                num_generations=4,
                max_completion_length=args.max_tokens,
                **settings,
            )
            trainer = GRPOTrainer(model, args=grpo, **common)
        else:
            from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

            dpo = OnlineDPOConfig(folder, per_device_train_batch_size=8, max_new_tokens=args.max_tokens, **settings)
            trainer = OnlineDPOTrainer(model, args=dpo, **common)
        trainer.train()
    return snapshots[0].taken


def evaluate(args: argparse.Namespace, snapshots: list[tuple[float, dict[str, Any]]]) -> Curve:
    """Mean reward of every snapshot on the held-out prompts."""
    from rlhf_pl.models.chat import encode_prompt
    from rlhf_pl.models.source import ModelSource
    from rlhf_pl.rollout import EngineSpec, PromptTokens, SamplingConfig, VLLMSampler

    source = ModelSource(args.model)
    held_out = read_prompts()[1]
    prompts = [encode_prompt(source.tokenizer, [{"role": "user", "content": row["prompt"]}]) for row in held_out]
    sampler = VLLMSampler(dtype="float32")
    sampler.start(EngineSpec(source, max(map(len, prompts)) + args.max_tokens, len(prompts)))
    sampling = SamplingConfig(num_responses=1, temperature=0.5, max_response_tokens=args.max_tokens)
    curve: Curve = []
    for seconds, weights in snapshots:
        sampler.load_weights(weights.items())
        total = 0.0
        for index, (response,) in sampler.generate([PromptTokens(ids, i) for i, ids in enumerate(prompts)], sampling):
            text = source.tokenizer.decode(response.token_ids, skip_special_tokens=True)
            total += score(held_out[index]["prompt"], text, response.finished)
        curve.append((seconds, total / len(prompts)))
    sampler.close()
    return curve


if __name__ == "__main__":
    main()
