"""A whole round after the first: ours, and TRL's OnlineDPOTrainer on the same prompts.

Both sample two responses per prompt, score them with the same function, and train on the pairs with equally large
updates, in float32. The last round is timed: the third with vLLM, as memory still grows in the second, otherwise the
second. TRL samples with transformers, as its vLLM modes need a GPU.

    python -m benchmarks.whole_round
    python -m benchmarks.whole_round --device cuda --model random-1b --prompts 256 --pairs 32 --max_tokens 256

On a GPU only ours is timed, with vLLM in bfloat16 and training in bf16-mixed.
"""

import argparse
import csv
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    MODEL,
    describe_machine,
    format_table,
    make_parser,
    model_folder,
    peak_memory,
    run_in_process,
)

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
MICRO_BATCH = 4
PHASES = {"sample": "responses", "score": "rewards", "log-probs": "logps", "train": "training"}
VARIANTS = {"rlhf-pl": "rlhf-pl, vLLM", "rlhf-pl-transformers": "rlhf-pl, transformers", "trl": "TRL OnlineDPO"}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=str(MODEL), help="a folder, or random-1b for a random Llama")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per round")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per update")
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.pairs % MICRO_BATCH or args.prompts % args.pairs:
        parser.error(f"--pairs must be a multiple of {MICRO_BATCH}, the micro-batch, and --prompts one of --pairs")
    variants = ["rlhf-pl"] if args.device == "cuda" else list(VARIANTS)
    with model_folder(args.model, args.device) as args.model:
        results = {
            name: run_in_process(train_with_trl if name == "trl" else train_with_lightning, args, name)
            for name in variants
        }
    print(describe_machine())
    print(f"{args.prompts} prompts x 2 responses of up to {args.max_tokens} tokens, {args.pairs} pairs per update\n")
    rows = []
    for name, result in results.items():
        seconds = result["seconds"]
        parts = [f"{result[phase]:.1f}" if phase in result else "" for phase in PHASES]
        rest = f"{1 - sum(result[phase] for phase in PHASES) / seconds:.1%}" if "train" in result else ""
        rows.append([VARIANTS[name], f"{seconds:.1f}", result["tokens"], f"{result['gib']:.2f}", *parts, rest])
    print(format_table(["", "round, s", "response tokens", "peak GiB", *PHASES, "none of these"], rows))
    if "sync" in results["rlhf-pl"]:
        print(f"\nweight sync with its check: {results['rlhf-pl']['sync']:.2f} s")
    for name in ("rlhf-pl", "rlhf-pl-transformers") if "trl" in results else ():
        print(f"\n{VARIANTS[name]}: {results['trl']['seconds'] / results[name]['seconds']:.2f}x TRL")


def variety(response: str) -> float:
    """A reward that differs between responses."""
    return len(set(response.split())) / 10


def read_prompts(count: int) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    return [{"prompt_id": str(i), "prompt": row["prompt"]} for i, row in enumerate(rows[:count])]


def train_with_lightning(args: argparse.Namespace, variant: str) -> dict[str, float]:
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    from rlhf_pl import RebelModule, RoundDataModule, SamplingConfig, TransformersSampler, VLLMSampler
    from rlhf_pl.callbacks import RoundRefresh
    from rlhf_pl.optim import AdamW

    on_gpu = args.device == "cuda"
    dtype = "bfloat16" if on_gpu else "float32"
    ends: list[float] = []
    rounds = 3 if variant == "rlhf-pl" else 2

    class Clock(L.Callback):
        def on_train_epoch_end(self, *args: Any) -> None:
            ends.append(time.monotonic())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in read_prompts(args.prompts)))
        L.seed_everything(args.seed, verbose=False)
        refresh = RoundRefresh(
            reward="benchmarks.whole_round.variety",
            sampler=VLLMSampler(dtype=dtype) if variant == "rlhf-pl" else TransformersSampler(),  # type: ignore[arg-type]
            sampling=SamplingConfig(num_responses=2, max_response_tokens=args.max_tokens),
        )
        trainer = L.Trainer(
            accelerator="gpu" if on_gpu else "cpu",
            devices=1,
            precision="bf16-mixed" if on_gpu else "32-true",
            max_epochs=rounds,
            accumulate_grad_batches=args.pairs // MICRO_BATCH,
            default_root_dir=folder / "run",
            callbacks=[refresh, Clock()],
            logger=CSVLogger(folder, name="csv", version=""),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = RoundDataModule(str(prompts), val_prompts=0, batch_size=MICRO_BATCH)
        with peak_memory(args.device) as peak:
            trainer.fit(RebelModule(args.model, optimizer=lambda p: AdamW(p, lr=1e-6)), datamodule=data)
        stored = data.store.round(rounds - 1)
        phases = {name: float(stored.info(stage)["seconds"]) for name, stage in PHASES.items()}
        seconds = ends[-1] - ends[-2]
        tokens = int(stored.info("responses")["tokens"])
        with (folder / "csv" / "metrics.csv").open() as file:
            syncs = [float(row["time/sync_s"]) for row in csv.DictReader(file) if row.get("time/sync_s")]
    return {
        "seconds": seconds,
        "tokens": tokens,
        "gib": peak["gib"],
        **phases,
        **({"sync": syncs[-1]} if on_gpu else {}),
    }


def train_with_trl(args: argparse.Namespace, variant: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    ends: list[float] = []
    tokens = [0]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    updates = args.prompts // args.pairs

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.monotonic())

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        if len(ends) >= updates:
            tokens[0] += sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
        return [variety(text) for text in texts]

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in read_prompts(args.prompts)]
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        settings = OnlineDPOConfig(
            folder,
            per_device_train_batch_size=args.pairs,
            max_steps=2 * updates,
            max_new_tokens=args.max_tokens,
            temperature=1.0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=args.seed,
        )
        trainer = OnlineDPOTrainer(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return {"seconds": ends[-1] - ends[updates - 1], "tokens": tokens[0], "gib": peak["gib"]}


if __name__ == "__main__":
    main()
