"""Pairs per second and peak memory of training: ours, TRL's DPOTrainer, and the authors' fixed-length layout.

Every variant trains the same pairs from the same model in float32 in a process of its own, with AdamW, equal
micro-batches and no gradient checkpointing, after warming up. `--updates` are timed (of the authors' layout, whose
micro-batches are all alike, one micro-batch); the loss is that of the first micro-batch of these.

    python -m benchmarks.training_step                      # all profiles and variants
    python -m benchmarks.training_step --profile chat --scale 1 --pairs 4
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    MODEL,
    PROFILES,
    Pair,
    in_a_process,
    machine,
    make_pairs,
    make_parser,
    peak_memory,
    table,
)

VARIANTS = {
    "fixed": "the authors' layout: every row padded to fixed lengths, full logits",
    "padded": "rows padded to the longest, full logits",
    "chunked": "+ log-probs in chunks, at response tokens alone",
    "shared": "+ prompts shared between answers, no padding",
    "rlhf-pl": "rlhf-pl: the same in RebelModule and Lightning's Trainer",
    "trl": "TRL DPOTrainer",
    "trl-ref": "TRL DPOTrainer, its reference log-probs computed before",
}
MICRO_BATCH = 4


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--profile", choices=PROFILES, action="append")
    parser.add_argument("--variant", choices=VARIANTS, action="append")
    parser.add_argument("--scale", type=float, default=0.25, help="of the profiles' lengths")
    parser.add_argument("--pairs", type=int, default=8, help="an update")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.pairs % MICRO_BATCH:
        parser.error(f"--pairs must be a multiple of {MICRO_BATCH}, the micro-batch, got {args.pairs}")
    profiles, variants = args.profile or list(PROFILES), args.variant or list(VARIANTS)
    print(machine())
    print(f"{Path(args.model).name}, lengths x {args.scale:g}, {args.pairs} pairs an update, {args.updates} updates\n")
    for profile in profiles:
        rows: list[list[Any]] = []
        found: dict[str, dict[str, float]] = {}
        for variant in variants:
            found[variant] = in_a_process(measure, args, profile, variant)
            ours = found[variant]
            rows.append([VARIANTS[variant], f"{ours['pairs_per_s']:.3f}", f"{ours['gib']:.2f}", f"{ours['loss']:.5f}"])
        print(f"**{profile}**\n\n{table(['', 'pairs/s', 'peak GiB', 'loss'], rows)}\n")
        if "rlhf-pl" in found:
            speed = found["rlhf-pl"]["pairs_per_s"]
            ratios = [f"{n} {speed / f['pairs_per_s']:.2f}x" for n, f in found.items() if n != "rlhf-pl"]
            print(f"rlhf-pl against {', '.join(ratios)}\n", flush=True)


def measure(args: argparse.Namespace, profile_name: str, variant: str) -> dict[str, float]:
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    profile = PROFILES[profile_name].scaled(args.scale)
    vocabulary = transformers.AutoConfig.from_pretrained(args.model).vocab_size
    pairs = make_pairs(profile, args.pairs * (1 + args.updates), vocabulary, args.seed)
    run = {"trl": with_trl, "trl-ref": with_trl, "rlhf-pl": with_lightning}.get(variant)
    if run is None:
        return plain_loop(args, pairs, variant, profile)
    return run(args, pairs, variant)


def plain_loop(args: argparse.Namespace, pairs: list[Pair], variant: str, profile: Any) -> dict[str, float]:
    """Forward, backward, update. The Trainer around it adds milliseconds a micro-batch."""
    import torch

    from rlhf_pl.logprobs import gather_logps
    from rlhf_pl.policy import PolicyLM, PolicySource, load_lm
    from rlhf_pl.rows import Tree, lay_out, padded

    with peak_memory() as peak:
        lm = load_lm(PolicySource(args.model)).train()
        if variant != "shared":
            lm.set_attn_implementation("sdpa")
        policy = PolicyLM(lm)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-6)

        def totals(batch: list[Pair]) -> Any:
            rows = lay_out([Tree(p.prompt, (p.chosen, p.rejected)) for p in batch])
            if variant in ("chunked", "shared"):
                return rows.totals(policy(**rows.inputs())).view(-1, 2).T
            ids, mask = padded(rows.input_ids, rows.lengths)
            wanted = rows.answer_of, rows.position_ids[0, rows.predictors]
            if variant == "fixed":  # prompts end, and answers begin, at the same column in every row
                width = profile.fixed_prompt + profile.fixed_response
                fixed = torch.zeros(len(ids), width, dtype=torch.long)
                fixed_mask = torch.zeros_like(fixed)
                shift = torch.tensor([profile.fixed_prompt - len(p.prompt) for p in batch for _ in (0, 1)])
                for i, (row, on) in enumerate(zip(ids, mask, strict=True)):
                    place = slice(int(shift[i]), int(shift[i] + on.sum()))
                    fixed[i, place], fixed_mask[i, place] = row[: int(on.sum())], 1
                ids, mask, wanted = fixed, fixed_mask, (wanted[0], wanted[1] + shift[wanted[0]])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            targets = ids.roll(-1, 1)
            all_logps = gather_logps(logits.flatten(0, 1), targets.flatten()).view(ids.shape)
            return rows.totals(all_logps[wanted]).view(-1, 2).T

        def train(batch: list[Pair]) -> float:
            """The loss of its first micro-batch."""
            losses = []
            for start in range(0, len(batch), MICRO_BATCH):
                logps = totals(batch[start : start + MICRO_BATCH])
                loss = (0.01 * (logps[0] - logps[1]) - 1).square().sum() / args.pairs
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            return losses[0]

        train(pairs[:MICRO_BATCH])
        timed = pairs[args.pairs :]
        if variant == "fixed":
            timed = timed[:MICRO_BATCH]  # all its micro-batches are of the same shape, and take as long
        started = time.monotonic()
        losses = [train(timed[start : start + args.pairs]) for start in range(0, len(timed), args.pairs)]
        seconds = time.monotonic() - started
    return {"pairs_per_s": len(timed) / seconds, "gib": peak["gib"], "loss": losses[0]}


def with_lightning(args: argparse.Namespace, pairs: list[Pair], variant: str) -> dict[str, float]:
    import lightning as L
    import pyarrow as pa

    from rlhf_pl import RebelModule
    from rlhf_pl.data.pairs import PairDataset, RoundBatches, RoundLoader
    from rlhf_pl.data.update_plan import UpdatePlan
    from rlhf_pl.optim import AdamW

    times: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step > len(times):
                times.append(time.monotonic())

    tokens = {f"{name}_tokens": [getattr(p, name) for p in pairs] for name in ("prompt", "chosen", "rejected")}
    numbers = {
        f"{name}_{what}": [0.0] * len(pairs) for name in ("chosen", "rejected") for what in ("reward", "old_logp")
    }
    dataset = PairDataset(pa.table(tokens | numbers), pa.table(numbers), 1.0)
    plan = UpdatePlan(len(pairs), MICRO_BATCH, args.pairs // MICRO_BATCH)
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=plan.accumulate,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.callbacks.append(Clock())  # type: ignore[attr-defined]
        module = RebelModule(args.model, optimizer=lambda p: AdamW(p, lr=1e-6))
        trainer.fit(module, RoundLoader(dataset, RoundBatches(plan, "0"), 0))
    seconds = times[-1] - times[0]
    return {"pairs_per_s": args.updates * args.pairs / seconds, "gib": peak["gib"], "loss": float("nan")}


def with_trl(args: argparse.Namespace, pairs: list[Pair], variant: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.monotonic())

    tokens = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    if variant == "trl-ref":
        tokens = [t | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for t in tokens]
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        settings = DPOConfig(
            folder,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=args.pairs // MICRO_BATCH,
            max_steps=1 + args.updates,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            max_length=None,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            precompute_ref_log_probs=variant == "trl-ref",
        )
        text = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}] * len(tokens))
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            args=settings,
            train_dataset=text,
            processing_class=AutoTokenizer.from_pretrained(args.model),
            callbacks=[Clock()],
        )
        trainer.train_dataset = Dataset.from_list(tokens)
        trainer.train()
    seconds = times[-1] - times[0]
    return {"pairs_per_s": args.updates * args.pairs / seconds, "gib": peak["gib"], "loss": float("nan")}


if __name__ == "__main__":
    main()
