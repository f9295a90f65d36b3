"""Pairs per second and peak memory of training: ours, TRL's DPOTrainer, and the authors' fixed-length layout.

Every variant trains the same model on the same pairs in a separate process, with AdamW, equal micro-batches and no
gradient checkpointing, after a warm-up. `--updates` updates are timed (only one micro-batch of the authors' layout,
whose micro-batches all have the same shape); the reported loss is that of the first timed micro-batch. On a GPU the
updates are timed twice, first with new shapes and then with the same shapes again. Tokens per second, the MFU (relative
to the matmul peak measured in the same run) and the device's peak memory, also without weights, gradients and AdamW's
moments, are reported.

    python -m benchmarks.training_step                      # all profiles and variants, on the CPU in float32
    python -m benchmarks.training_step --profile chat --scale 1 --pairs 4
    python -m benchmarks.training_step --variant grpo --variant trl-grpo --profile short --profile summarisation
    python -m benchmarks.training_step --device cuda --model random-1b --profile chat --precision bf16-mixed
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    MODEL,
    PROFILES,
    Pair,
    describe_machine,
    format_table,
    make_pairs,
    make_parser,
    model_folder,
    peak_memory,
    run_in_process,
)
from benchmarks.grpo_update import train_with_trl_grpo
from benchmarks.mfu import count_tokens, measure_matmul_peak, minimum_flops

ON_CPU = {
    "fixed": "the authors' layout: every row padded to fixed lengths, full logits",
    "padded": "rows padded to the longest, full logits",
    "chunked": "+ log-probs in chunks, only at response tokens",
    "shared": "+ prompts shared between responses, no padding",
    "rlhf-pl": "rlhf-pl: the same in RebelModule and Lightning's Trainer",
    "all-pairs": "rlhf-pl, all 6 pairs of 4 responses to each prompt; prompts/s",
    "trl": "TRL DPOTrainer",
    "trl-ref": "TRL DPOTrainer, reference log-probs precomputed",
    "grpo": "rlhf-pl, GRPO on 4 responses to each prompt; prompts/s",
    "trl-grpo": "TRL GRPOTrainer, the same responses; prompts/s",
}
ON_GPU = {
    "rlhf-pl": "rlhf-pl",
    "plain-layers": "rlhf-pl without liger-kernel",
    "trl": "TRL DPOTrainer, mixed",
    "trl-ref": "TRL DPOTrainer, mixed, reference log-probs precomputed",
    "trl-liger": "TRL DPOTrainer, mixed, the same with liger-kernel",
}
VARIANTS = {**ON_GPU, **ON_CPU}
MICRO_BATCH = {"cpu": 4, "cuda": 8}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=str(MODEL), help="a folder, or random-1b for a random Llama")
    parser.add_argument(
        "--precision", choices=("32-true", "bf16-mixed", "bf16"), help="of ours; bf16: bfloat16 weights"
    )
    parser.add_argument("--max_tokens", type=int, help="tokens per micro-batch of ours, instead of pairs")
    parser.add_argument("--profile", choices=PROFILES, action="append")
    parser.add_argument("--variant", choices=VARIANTS, action="append")
    parser.add_argument("--scale", type=float, help="factor of the profiles' lengths; default: 0.25, on a GPU 1")
    parser.add_argument("--pairs", type=int, help="pairs per update; default: 8, on a GPU 32")
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
    print(describe_machine())
    with model_folder(args.model, args.device) as args.model:
        print(
            f"{Path(args.model).name}, lengths x {args.scale:g}, {args.pairs} pairs per update, {args.updates} updates"
        )
        print(f"micro-batches of {args.micro_batch} pairs, ours in {args.precision}\n")
        show = show_gpu if on_gpu else show_cpu
        peak = run_in_process(measure_matmul_peak) if on_gpu else 0.0
        for profile in profiles:
            show(profile, {variant: run_in_process(measure, args, profile, variant) for variant in variants}, peak)


def show_cpu(profile: str, results: dict[str, dict[str, float]], _: float) -> None:
    rows = [[VARIANTS[v], f"{f['pairs_per_s']:.3f}", f"{f['gib']:.2f}", f"{f['loss']:.5f}"] for v, f in results.items()]
    print(f"**{profile}**\n\n{format_table(['', 'pairs/s', 'peak GiB', 'loss'], rows)}\n")
    if {"grpo", "trl-grpo"} <= set(results):
        print(f"grpo against trl-grpo {results['grpo']['pairs_per_s'] / results['trl-grpo']['pairs_per_s']:.2f}x\n")
    if "rlhf-pl" in results:
        speed = results["rlhf-pl"]["pairs_per_s"]
        others = {n: f for n, f in results.items() if n != "rlhf-pl" and "grpo" not in n}
        ratios = [f"{n} {speed / f['pairs_per_s']:.2f}x" for n, f in others.items()]
        print(f"rlhf-pl against {', '.join(ratios)}\n", flush=True)


def show_gpu(profile: str, results: dict[str, dict[str, float]], peak: float) -> None:
    rows = []
    for variant, f in results.items():
        share = f["flops_per_pair"] * f["seen_pairs_per_s"] / peak
        rows.append(
            [
                VARIANTS[variant],
                f"{f['pairs_per_s']:.1f}",
                f"{f['seen_pairs_per_s']:.1f}",
                f"{f['seen_pairs_per_s'] * f['tokens_per_pair']:,.0f}",
                f"{share:.2f}",
                f"{f['gib']:.1f}",
                f"{f['gib'] - f['state_gib']:.1f}",
            ]
        )
    header = ["", "pairs/s, new shapes", "seen", "tokens/s", "MFU", "peak GiB", "above weights, gradients, moments"]
    print(f"**{profile}** (matmul peak {peak / 1e12:.0f} TFLOP/s)\n\n{format_table(header, rows)}\n", flush=True)


def measure(args: argparse.Namespace, profile_name: str, variant: str) -> dict[str, float]:
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    profile = PROFILES[profile_name].scaled(args.scale)
    config = transformers.AutoConfig.from_pretrained(args.model)
    pairs = make_pairs(profile, args.pairs * (1 + args.updates), config.vocab_size, args.seed)
    timed = pairs[args.pairs :]
    counts = {}
    if args.device == "cuda":
        pairs += timed  # the same shapes again
        counts = {
            "flops_per_pair": minimum_flops(timed, config) / len(timed),
            "tokens_per_pair": count_tokens(timed) / len(timed),
        }
    if variant == "trl-grpo":
        times, gib = train_with_trl_grpo(args, pairs, make_more(args, pairs, variant))
        return compute_speeds(args, times) | {"gib": gib, "loss": float("nan")} | counts
    if variant.startswith("trl"):
        return train_with_trl(args, pairs, variant) | counts
    if variant in ("rlhf-pl", "plain-layers", "all-pairs", "grpo"):
        return train_with_lightning(args, pairs, variant) | counts
    return train_in_plain_loop(args, pairs, variant, profile) | counts


def compute_speeds(args: argparse.Namespace, times: list[float]) -> dict[str, float]:
    """Pairs per second from the end times of all updates, of which the first is the warm-up."""
    count = args.updates * args.pairs
    if args.device == "cpu":
        return {"pairs_per_s": count / (times[-1] - times[0])}
    repeat_start = times[args.updates]
    return {"pairs_per_s": count / (repeat_start - times[0]), "seen_pairs_per_s": count / (times[-1] - repeat_start)}


def now(args: argparse.Namespace) -> float:
    """The time after all work of the device is done."""
    if args.device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.monotonic()


def train_in_plain_loop(args: argparse.Namespace, pairs: list[Pair], variant: str, profile: Any) -> dict[str, float]:
    """Forward, backward, update; a Trainer would add milliseconds per micro-batch."""
    import torch

    from rlhf_pl.models.logprobs import gather_logps
    from rlhf_pl.models.packed_batch import PrefixGroup, pack, unpack
    from rlhf_pl.models.policy import PolicyLM, load_lm
    from rlhf_pl.models.source import ModelSource

    with peak_memory() as peak:
        lm = load_lm(ModelSource(args.model)).train()
        if variant != "shared":
            lm.set_attn_implementation("sdpa")
        policy = PolicyLM(lm)
        optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-6)

        def compute_logps(batch: list[Pair]) -> Any:
            rows = pack([PrefixGroup(p.prompt, (p.chosen, p.rejected)) for p in batch])
            if variant in ("chunked", "shared"):
                return rows.sum_per_response(policy(**rows.inputs())).view(-1, 2).T
            ids, mask = unpack(rows.input_ids, rows.lengths)
            targets_at = rows.response_ids, rows.position_ids[0, rows.logit_positions]
            if variant == "fixed":  # responses start at the same column in every row
                width = profile.fixed_prompt + profile.fixed_response
                fixed = torch.zeros(len(ids), width, dtype=torch.long)
                fixed_mask = torch.zeros_like(fixed)
                shift = torch.tensor([profile.fixed_prompt - len(p.prompt) for p in batch for _ in (0, 1)])
                for i, (row, on) in enumerate(zip(ids, mask, strict=True)):
                    place = slice(int(shift[i]), int(shift[i] + on.sum()))
                    fixed[i, place], fixed_mask[i, place] = row[: int(on.sum())], 1
                ids, mask = fixed, fixed_mask
                targets_at = targets_at[0], targets_at[1] + shift[targets_at[0]]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            targets = ids.roll(-1, 1)
            all_logps = gather_logps(logits.flatten(0, 1), targets.flatten()).view(ids.shape)
            return rows.sum_per_response(all_logps[targets_at]).view(-1, 2).T

        def train(batch: list[Pair]) -> float:
            """Make an update; returns the loss of its first micro-batch."""
            losses = []
            for start in range(0, len(batch), args.micro_batch):
                logps = compute_logps(batch[start : start + args.micro_batch])
                loss = (0.01 * (logps[0] - logps[1]) - 1).square().sum() / args.pairs
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            return losses[0]

        train(pairs[: args.micro_batch])
        timed = pairs[args.pairs :]
        if variant == "fixed":
            timed = timed[: args.micro_batch]  # all its micro-batches have the same shape and take the same time
        started = time.monotonic()
        losses = [train(timed[start : start + args.pairs]) for start in range(0, len(timed), args.pairs)]
        seconds = time.monotonic() - started
    return {"pairs_per_s": len(timed) / seconds, "gib": peak["gib"], "loss": losses[0]}


def make_more(args: argparse.Namespace, pairs: list[Pair], variant: str) -> list[Pair]:
    """Further pairs of responses of the same lengths, for the variants with four responses to a prompt."""
    if variant not in ("all-pairs", "grpo", "trl-grpo"):
        return []
    order = list(range(len(pairs)))
    random.Random(args.seed).shuffle(order)
    return [pairs[i] for i in order]


def make_dataset(pairs: list[Pair], others: list[Pair], variant: str) -> Any:
    """A group of two responses, one pair, for each prompt; with the responses of `others`, of four, all pairs.

    For GRPO the groups have no pairs but log-probs of tokens.
    """
    import itertools

    import numpy as np
    import pyarrow as pa
    import torch

    from rlhf_pl.data.group_batches import GroupDataset
    from rlhf_pl.data.stored_groups import TOKENS, StoredGroups, StoredPairs

    responses = [[p.chosen, p.rejected] for p in pairs]
    for row, other in zip(responses, others, strict=False):
        row += [other.chosen, other.rejected]
    size, count = len(responses[0]), len(pairs)
    total = size * count
    positions = np.tile(list(itertools.combinations(range(size), 2)), (count, 1))
    groups = StoredGroups(
        prompt_ids=pa.array([str(i) for i in range(count) for _ in range(size)]),
        indices=np.tile(np.arange(size), count),
        prompt_tokens=pa.array([p.prompt for p in pairs for _ in range(size)], TOKENS),
        response_tokens=pa.array([r for row in responses for r in row], TOKENS),
        finished=np.ones(total, bool),
        rewards=np.random.default_rng(0).random(total),
        sizes=np.full(count, size),
        members=np.arange(total),
        pairs=None if variant == "grpo" else StoredPairs(positions, np.full(count, len(positions) // count)),
    )
    if variant == "grpo":
        old = [np.full(len(r), -10.0, np.float32) for row in responses for r in row]
        sums = torch.tensor([float(values.sum()) for values in old])
        return GroupDataset(groups, {"old_token_logps": pa.array(old), "old_logps": sums}, 1.0)
    return GroupDataset(groups, {"old_logps": torch.zeros(total)}, 1.0)


def train_with_lightning(args: argparse.Namespace, pairs: list[Pair], variant: str) -> dict[str, float]:
    import lightning as L

    from rlhf_pl import GRPOLoss, RebelLoss, RebelModule
    from rlhf_pl.data.micro_batches import MicroBatchSampler, ResumableLoader
    from rlhf_pl.data.update_plan import UpdatePlan
    from rlhf_pl.optim import AdamW

    times: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step > len(times):
                times.append(now(args))

    class InOrder(MicroBatchSampler):
        """The pairs in the order in which they are given."""

        def _order(self) -> list[int]:
            return list(range(self.plan.total_pairs))

    dataset = make_dataset(pairs, make_more(args, pairs, variant), variant)
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
            GRPOLoss() if variant == "grpo" else RebelLoss(),
            optimizer=lambda p: AdamW(p, lr=1e-6),
            dtype="bfloat16" if args.precision == "bf16" else "float32",
            use_liger_kernel=False if variant == "plain-layers" else None,
        )
        trainer.fit(module, ResumableLoader(dataset, batches, 0))
    state = 4 * sum(p.numel() * p.element_size() for p in module.parameters()) / 2**30
    return compute_speeds(args, times) | {"gib": peak["gib"], "state_gib": state, "loss": float("nan")}


def train_with_trl(args: argparse.Namespace, pairs: list[Pair], variant: str) -> dict[str, float]:
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
    return compute_speeds(args, times) | {"gib": peak["gib"], "state_gib": state, "loss": float("nan")}


if __name__ == "__main__":
    main()
