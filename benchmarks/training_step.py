"""Pairs per second and peak memory of training: ours, TRL's DPOTrainer, and the authors' fixed-length layout.

Every variant trains the same pairs from the same model in a process of its own, with AdamW, equal micro-batches and no
gradient checkpointing, after warming up. `--updates` are timed (of the authors' layout, whose micro-batches are all
alike, one micro-batch); the loss is that of the first micro-batch of these. On a GPU they are timed twice, with shapes
that are new and then with the same again, with tokens a second, the share of the matmul peak measured in the same run,
and the device's peak memory, also without weights, gradients and AdamW's moments.

    python -m benchmarks.training_step                      # all profiles and variants, on the CPU in float32
    python -m benchmarks.training_step --profile chat --scale 1 --pairs 4
    python -m benchmarks.training_step --device cuda --model random-1b --profile chat --precision bf16-mixed
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
    model_folder,
    peak_memory,
    table,
)
from benchmarks.mfu import least_flops, matmul_peak, tokens_of

ON_CPU = {
    "fixed": "the authors' layout: every row padded to fixed lengths, full logits",
    "padded": "rows padded to the longest, full logits",
    "chunked": "+ log-probs in chunks, at response tokens alone",
    "shared": "+ prompts shared between answers, no padding",
    "rlhf-pl": "rlhf-pl: the same in RebelModule and Lightning's Trainer",
    "trl": "TRL DPOTrainer",
    "trl-ref": "TRL DPOTrainer, its reference log-probs computed before",
}
ON_GPU = {
    "rlhf-pl": "rlhf-pl",
    "plain-layers": "rlhf-pl without liger-kernel",
    "trl": "TRL DPOTrainer, mixed",
    "trl-ref": "TRL DPOTrainer, mixed, its reference log-probs computed before",
    "trl-liger": "TRL DPOTrainer, mixed, the same with liger-kernel",
}
VARIANTS = {**ON_GPU, **ON_CPU}
MICRO_BATCH = {"cpu": 4, "cuda": 8}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=str(MODEL), help="a folder, or random-1b: 1.24 B, made on the spot")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed", "bf16"), help="of ours; bf16 is the weights'")
    parser.add_argument("--max_tokens", type=int, help="tokens of a micro-batch of ours, instead of pairs")
    parser.add_argument("--profile", choices=PROFILES, action="append")
    parser.add_argument("--variant", choices=VARIANTS, action="append")
    parser.add_argument("--scale", type=float, help="of the profiles' lengths; default: 0.25, on a GPU 1")
    parser.add_argument("--pairs", type=int, help="an update; default: 8, on a GPU 32")
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.micro_batch = MICRO_BATCH[args.device]
    args.scale, args.pairs = args.scale or (1.0 if on_gpu else 0.25), args.pairs or (32 if on_gpu else 8)
    args.precision = args.precision or ("bf16-mixed" if on_gpu else "32-true")
    if args.pairs % args.micro_batch:
        parser.error(f"--pairs must be a multiple of {args.micro_batch}, the micro-batch, got {args.pairs}")
    profiles, variants = args.profile or list(PROFILES), args.variant or list(ON_GPU if on_gpu else ON_CPU)
    print(machine())
    with model_folder(args.model, args.device) as args.model:
        print(
            f"{Path(args.model).name}, lengths x {args.scale:g}, {args.pairs} pairs an update, {args.updates} updates"
        )
        print(f"micro-batches of {args.micro_batch} pairs, ours in {args.precision}\n")
        show = show_gpu if on_gpu else show_cpu
        peak = in_a_process(matmul_peak) if on_gpu else 0.0
        for profile in profiles:
            show(profile, {variant: in_a_process(measure, args, profile, variant) for variant in variants}, peak)


def show_cpu(profile: str, found: dict[str, dict[str, float]], _: float) -> None:
    rows = [[VARIANTS[v], f"{f['pairs_per_s']:.3f}", f"{f['gib']:.2f}", f"{f['loss']:.5f}"] for v, f in found.items()]
    print(f"**{profile}**\n\n{table(['', 'pairs/s', 'peak GiB', 'loss'], rows)}\n")
    if "rlhf-pl" in found:
        speed = found["rlhf-pl"]["pairs_per_s"]
        ratios = [f"{n} {speed / f['pairs_per_s']:.2f}x" for n, f in found.items() if n != "rlhf-pl"]
        print(f"rlhf-pl against {', '.join(ratios)}\n", flush=True)


def show_gpu(profile: str, found: dict[str, dict[str, float]], peak: float) -> None:
    rows = []
    for variant, f in found.items():
        share = f["flops_a_pair"] * f["seen_pairs_per_s"] / peak
        rows.append(
            [
                VARIANTS[variant],
                f"{f['pairs_per_s']:.1f}",
                f"{f['seen_pairs_per_s']:.1f}",
                f"{f['seen_pairs_per_s'] * f['tokens_a_pair']:,.0f}",
                f"{share:.2f}",
                f"{f['gib']:.1f}",
                f"{f['gib'] - f['state_gib']:.1f}",
            ]
        )
    header = ["", "pairs/s, new shapes", "seen", "tokens/s", "MFU", "peak GiB", "above weights, gradients, moments"]
    print(f"**{profile}** (matmul peak {peak / 1e12:.0f} TFLOP/s)\n\n{table(header, rows)}\n", flush=True)


def measure(args: argparse.Namespace, profile_name: str, variant: str) -> dict[str, float]:
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    profile = PROFILES[profile_name].scaled(args.scale)
    config = transformers.AutoConfig.from_pretrained(args.model)
    pairs = make_pairs(profile, args.pairs * (1 + args.updates), config.vocab_size, args.seed)
    timed = pairs[args.pairs :]
    facts = {}
    if args.device == "cuda":
        pairs += timed  # the same shapes again
        facts = {
            "flops_a_pair": least_flops(timed, config) / len(timed),
            "tokens_a_pair": tokens_of(timed) / len(timed),
        }
    if variant.startswith("trl"):
        return with_trl(args, pairs, variant) | facts
    if variant in ("rlhf-pl", "plain-layers"):
        return with_lightning(args, pairs, variant) | facts
    return plain_loop(args, pairs, variant, profile) | facts


def speeds(args: argparse.Namespace, times: list[float]) -> dict[str, float]:
    """Of the ends of all updates, the first one being the warm-up."""
    count = args.updates * args.pairs
    if args.device == "cpu":
        return {"pairs_per_s": count / (times[-1] - times[0])}
    middle = times[args.updates]
    return {"pairs_per_s": count / (middle - times[0]), "seen_pairs_per_s": count / (times[-1] - middle)}


def now(args: argparse.Namespace) -> float:
    """The time at which all that was asked of the device is done."""
    if args.device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.monotonic()


def plain_loop(args: argparse.Namespace, pairs: list[Pair], variant: str, profile: Any) -> dict[str, float]:
    """Forward, backward, update. The Trainer around it adds milliseconds a micro-batch."""
    import torch

    from rlhf_pl.models.logprobs import gather_logps
    from rlhf_pl.models.packed_batch import PrefixGroup, pack, padded
    from rlhf_pl.models.policy import PolicyLM, load_lm
    from rlhf_pl.models.source import ModelSource

    with peak_memory() as peak:
        lm = load_lm(ModelSource(args.model)).train()
        if variant != "shared":
            lm.set_attn_implementation("sdpa")
        policy = PolicyLM(lm)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-6)

        def totals(batch: list[Pair]) -> Any:
            rows = pack([PrefixGroup(p.prompt, (p.chosen, p.rejected)) for p in batch])
            if variant in ("chunked", "shared"):
                return rows.sum_per_response(policy(**rows.inputs())).view(-1, 2).T
            ids, mask = padded(rows.input_ids, rows.lengths)
            wanted = rows.response_ids, rows.position_ids[0, rows.logit_positions]
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
            return rows.sum_per_response(all_logps[wanted]).view(-1, 2).T

        def train(batch: list[Pair]) -> float:
            """The loss of its first micro-batch."""
            losses = []
            for start in range(0, len(batch), args.micro_batch):
                logps = totals(batch[start : start + args.micro_batch])
                loss = (0.01 * (logps[0] - logps[1]) - 1).square().sum() / args.pairs
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            return losses[0]

        train(pairs[: args.micro_batch])
        timed = pairs[args.pairs :]
        if variant == "fixed":
            timed = timed[: args.micro_batch]  # all its micro-batches are of the same shape, and take as long
        started = time.monotonic()
        losses = [train(timed[start : start + args.pairs]) for start in range(0, len(timed), args.pairs)]
        seconds = time.monotonic() - started
    return {"pairs_per_s": len(timed) / seconds, "gib": peak["gib"], "loss": losses[0]}


def with_lightning(args: argparse.Namespace, pairs: list[Pair], variant: str) -> dict[str, float]:
    import lightning as L
    import pyarrow as pa

    from rlhf_pl import RebelModule
    from rlhf_pl.data.pair_batches import GroupDataset, RoundBatches, RoundLoader
    from rlhf_pl.data.stored_groups import pair_copies, stored_numbers
    from rlhf_pl.data.update_plan import UpdatePlan
    from rlhf_pl.optim import AdamW

    times: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step > len(times):
                times.append(now(args))

    class InOrder(RoundBatches):
        """The pairs in the order in which they are given."""

        def _order(self) -> list[int]:
            return list(range(self.plan.total_pairs))

    tokens = {f"{name}_tokens": [getattr(p, name) for p in pairs] for name in ("prompt", "chosen", "rejected")}
    numbers = {
        f"{name}_{what}": [0.0] * len(pairs) for name in ("chosen", "rejected") for what in ("reward", "old_logp")
    }
    groups = pair_copies(pa.table(tokens | numbers | {"prompt_id": [str(i) for i in range(len(pairs))]}))
    dataset = GroupDataset(groups, stored_numbers(pa.table(numbers), groups), 1.0)
    plan = UpdatePlan(len(pairs), args.micro_batch, args.pairs // args.micro_batch, 1, args.max_tokens)
    batches = InOrder(plan, "", 0, dataset.lengths() if args.max_tokens else None)
    with tempfile.TemporaryDirectory() as folder, peak_memory(args.device) as peak:
        trainer = L.Trainer(
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if args.precision == "bf16-mixed" else "32-true",
            max_epochs=1,
            accumulate_grad_batches=batches.accumulate,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.callbacks.append(Clock())  # type: ignore[attr-defined]
        module = RebelModule(
            args.model,
            optimizer=lambda p: AdamW(p, lr=1e-6),
            dtype="bfloat16" if args.precision == "bf16" else "float32",
            use_liger_kernel=False if variant == "plain-layers" else None,
        )
        trainer.fit(module, RoundLoader(dataset, batches, 0))
    state = 4 * sum(p.numel() * p.element_size() for p in module.parameters()) / 2**30
    return speeds(args, times) | {"gib": peak["gib"], "state_gib": state, "loss": float("nan")}


def with_trl(args: argparse.Namespace, pairs: list[Pair], variant: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            times.append(now(args))

    tokens = [{"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs]
    if variant != "trl":
        tokens = [t | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for t in tokens]
    with tempfile.TemporaryDirectory() as folder, peak_memory(args.device) as peak:
        settings = DPOConfig(
            folder,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.pairs // args.micro_batch,
            max_steps=len(pairs) // args.pairs,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=args.device == "cuda",
            use_liger_kernel=variant == "trl-liger",
            max_length=None,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
            precompute_ref_log_probs=variant != "trl",
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
        state = 4 * sum(p.numel() * p.element_size() for p in trainer.model.parameters()) / 2**30
    return speeds(args, times) | {"gib": peak["gib"], "state_gib": state, "loss": float("nan")}


if __name__ == "__main__":
    main()
