"""`rlhf-pl plan`: estimates memory and time of a config, without loading weights."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table

from rlhf_pl.cli.fit import RlhfCLI
from rlhf_pl.cli.option_numbers import refuse_not_finite
from rlhf_pl.cli.parser_errors import CommandParser
from rlhf_pl.data import RoundDataModule
from rlhf_pl.data.policy_module import PolicyModule, find_missing_members, is_policy_module
from rlhf_pl.models.config_files import has_weights
from rlhf_pl.models.footprint import (
    DTYPE_BYTES,
    Kernels,
    activation_bytes,
    head_bytes,
    kv_bytes,
    model_size,
    reward_bytes,
)
from rlhf_pl.models.lora import LoRA
from rlhf_pl.models.policy import check_lm
from rlhf_pl.rewards.armorm import ArmoRMReward
from rlhf_pl.rewards.classifier import ClassifierReward
from rlhf_pl.rollout import VLLMSampler, VLLMServerSampler
from rlhf_pl.rollout.vllm_checks import MARGIN_BYTES
from rlhf_pl.rollout.vllm_server import BUCKET_BYTES
from rlhf_pl.rounds.disk_space import CHECKPOINTS
from rlhf_pl.utils.console import console
from rlhf_pl.utils.devices import fast_precision
from rlhf_pl.utils.disk import format_bytes
from rlhf_pl.utils.errors import InputError

_PHASES = ("train", "generate", "score", "sync")
_HINTS = {
    "train": {
        "activations": "--model.gradient_checkpointing true, or a smaller --data.batch_size with more accumulation",
        "output head": "a smaller --model.logprob_chunk_tokens",
        "copies in bf16": "--model.dtype bfloat16 with --trainer.precision 32-true",
        "optimizer": "--trainer.strategy fsdp2 over more devices, or --model.lora LoRA",
        "gradients": "--trainer.strategy fsdp2 over more devices, or --model.lora LoRA",
        "parameters": "--trainer.strategy fsdp2 over more devices",
    },
    "generate": {"sampler": "--rollout.sampler.tensor_parallel_size, or a smaller gpu_memory_utilization"},
    "score": {"reward model": "a reward model under `vllm serve` (VLLMServerReward), or a smaller dtype"},
    "sync": {"gathered unit": "more devices; a smaller part than a unit can't be gathered"},
}


class PlannedModule(PolicyModule, Protocol):
    """A `PolicyModule` with the options that memory and time depend on; see `RebelModule`."""

    trainable_layers: int | None
    lora: LoRA | None
    attn_implementation: str
    use_liger_kernel: bool | None
    gradient_checkpointing: bool
    logprob_chunk_tokens: int


class _PlannedCLI(RlhfCLI):
    """Reads the config and builds model and data, but no Trainer: its devices need not be on this machine."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        self.settings = {**self._get(self.config_init, "trainer", default={})}
        self.options = self._get(self.config_init, "rollout").options
        self.keep_rounds = self._get(self.config_init, "checkpoint").keep_rounds
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


def run(argv: Sequence[str]) -> int:
    """Run `rlhf-pl plan --config x.yaml`: print tables. Return the exit code, 1 if the config does not fit."""
    parser = CommandParser(
        prog="rlhf-pl plan",
        description="Memory per device and time per phase of a `rlhf-pl fit` config, without loading weights.",
        epilog="All other options are those of `rlhf-pl fit`.",
    )
    parser.add_argument(
        "--device_memory_gib", type=float, help="memory of a device, GiB; default: that of this machine's device"
    )
    parser.add_argument(
        "--response_tokens", type=float, help="mean length of a response, tokens; default: half of the maximum"
    )
    parser.add_argument(
        "--generate_tokens_per_s", type=float, help="throughput of an engine; default: 3000, on a CPU 200"
    )
    parser.add_argument(
        "--tflops", type=float, help="throughput of a device in training, TFLOP/s; default: 150, on a CPU 0.05"
    )
    own, rest = parser.parse_known_args(list(argv))
    refuse_not_finite(vars(own))
    cli = _PlannedCLI(["fit", *rest])
    if not is_policy_module(cli.model) or not isinstance(cli.datamodule, RoundDataModule) or not cli.options:
        raise InputError("`rlhf-pl plan` is for REBEL in rounds: RebelModule, RoundDataModule and a `rollout.reward`.")
    if missing := find_missing_members(cli.model, PlannedModule):
        raise InputError(f"`model`: {type(cli.model).__name__} lacks {', '.join(missing)}, which a plan needs.")
    _check_folders(cli.model, cli.options.reward)
    plan = _Plan(cli.model, cli.datamodule, cli.options, cli.settings, cli._get(cli.config_init, "rollout"))
    available = own.device_memory_gib * 2**30 if own.device_memory_gib else _available_memory(plan.on_gpu)
    return _show(plan, available, own, cli.keep_rounds)


def _check_folders(module: PolicyModule, reward: Any) -> None:
    """Refuse damaged models as `fit` does, if their weights are in a local folder. A plan needs no weights."""
    for source in {id(s): s for s in (module.source, module.reference_source)}.values():
        if has_weights(Path(source.path)):
            check_lm(source)
    for part in getattr(reward, "parts", [reward]):
        if isinstance(part, ClassifierReward | ArmoRMReward) and has_weights(Path(part.model)):
            part.check([])


class _Plan:
    """Estimates of a run's memory and time.

    Args:
        module: The policy module.
        data: The DataModule.
        options: The round's options.
        trainer: Options of the Trainer.
        refresh: The callback with the sampler.
    """

    def __init__(
        self, module: Any, data: RoundDataModule, options: Any, trainer: Mapping[str, Any], refresh: Any
    ) -> None:
        self.module, self.data, self.options, self.trainer = module, data, options, trainer
        self.sampler = refresh._link.sampler
        self.devices = _count_devices(trainer["devices"]) * int(trainer["num_nodes"])
        strategy = trainer["strategy"]
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        self.accumulate: int = trainer["accumulate_grad_batches"]
        self.all_ranks_read = name in ("fsdp", "fsdp_cpu_offload") or "FSDPStrategy" in name
        self.sharded = "fsdp" in name.lower() or "ModelParallel" in name
        self.on_gpu = trainer["accelerator"] != "cpu" and (torch.cuda.is_available() or self.devices > 1)
        precision = fast_precision(str(trainer["precision"] or "32-true"), self.on_gpu)
        mixed = getattr(strategy, "mixed_precision", None)
        self.bf16 = "16" in precision or (mixed is not None and mixed.param_dtype is not None)
        self.config = module.source.config
        half = self.bf16 or module.dtype_name != "float32"
        liger = self.on_gpu and module.use_liger_kernel is not False
        flash = self.on_gpu and half and module.attn_implementation == "sdpa"
        self.kernels = Kernels(half, module.attn_implementation, flash, liger)
        self.model = model_size(self.config, module.trainable_layers, module.lora)
        self.longest = data.max_prompt_tokens + options.sampling.max_response_tokens
        # responses per prompt that are trained on
        self.used = 2 if module.loss.per == "pair" else options.sampling.num_responses

    def memory(self, device_memory: float) -> dict[str, dict[str, int]]:
        """Bytes per device by phase and part, on devices of `device_memory` bytes."""
        module, model, config = self.module, self.model, self.config
        width, shards = DTYPE_BYTES[module.dtype_name], self.devices if self.sharded else 1
        held = {
            "parameters": width * model.total // shards,
            "optimizer": 2 * width * model.trainable // shards,
        }
        if self.kernels.half and width == 4 and not self.sharded:
            held["copies in bf16"] = 2 * model.total
        if not self.on_gpu:
            held["policy before the round"] = self.snapshot_bytes()
        unit = max(model.rest, model.layer)
        groups, response = self.data.batch_size, self.options.sampling.max_response_tokens
        group_tokens = self.longest + (self.used - 1) * response
        if self.data.max_tokens_per_batch is not None:
            groups = max(1, min(groups * self.accumulate, self.data.max_tokens_per_batch // group_tokens))
        # with shared-prefix attention a group holds its prompt once, and a batch is one row without padding
        shares = module.attn_implementation == "sdpa"
        rows, tokens = (1, groups * group_tokens) if shares else (self.used * groups, self.longest)
        training = {
            **held,
            "gradients": width * model.trainable // shards * (1 if self.sharded or self.devices == 1 else 2),
            "activations": activation_bytes(config, rows, tokens, self.kernels, module.gradient_checkpointing),
            "output head": head_bytes(
                config,
                min(module.logprob_chunk_tokens, self.used * groups * response),
                self.on_gpu,
                self.kernels.half,
                module.lora is None,
            ),
        }
        compute = 2 if self.kernels.half else width
        if self.sharded:
            training["gathered units"] = compute * (model.rest + 2 * model.layer)
        engine = self._engine_bytes(device_memory, held)
        sync = {
            **held,
            "sampler": engine,
            "gathered unit": width * unit if self.sharded else 0,
            "sync buffers": self._sync_buffer_bytes(unit),
        }
        return {
            "train": training | ({} if self.on_gpu else {"sampler": engine}),
            "generate": held | {"sampler": engine},
            "score": held | {"sampler": engine, "reward model": self._reward_bytes()},
            "sync": sync,
        }

    def _engine_bytes(self, device_memory: float, held: Mapping[str, int]) -> int:
        """Weights and KV cache of a rank's sampler. vLLM on a GPU fills its configured share of the memory."""
        if isinstance(self.sampler, VLLMServerSampler):
            return 0
        dtype = DTYPE_BYTES[self.sampler.dtype]
        weights = dtype * (self.model.total - self.model.adapters) // self.sampler.ranks_per_engine
        if isinstance(self.sampler, VLLMSampler) and not self.on_gpu:
            return weights + int(self.sampler.kv_cache_gib * 2**30)
        if isinstance(self.sampler, VLLMSampler):
            share = self.sampler.gpu_memory_utilization
            if share is None:
                return max(weights, int(device_memory - sum(held.values()) - self._reward_bytes() - MARGIN_BYTES))
            return max(weights, int(share * device_memory))
        sequences = min(
            getattr(self.sampler, "max_sequences", None) or self.sampler.batch_size,
            self.options.sampling.num_responses * self.options.shard_prompts,
        )
        return weights + kv_bytes(self.config, sequences, self.longest, dtype) // self.sampler.ranks_per_engine

    def host_memory(self) -> tuple[int, int]:
        """Bytes of the model in host memory, on rank 0 and on each other rank. Under FSDP1 all ranks read it."""
        whole = DTYPE_BYTES[self.module.dtype_name] * self.model.total
        return whole, whole if self.all_ranks_read else 0

    def checkpoint(self) -> int:
        """Bytes of a checkpoint: weights, and AdamW's two moments of the trainable ones."""
        return DTYPE_BYTES[self.module.dtype_name] * (self.model.total + 2 * self.model.trainable)

    def snapshot_bytes(self) -> int:
        """Bytes of each rank's snapshot of pi_old in host memory, for the KL on held-out prompts."""
        held_out = self.data.val_prompts_source not in (0, 0.0)
        return (
            held_out
            * DTYPE_BYTES[self.module.dtype_name]
            * self.model.trainable
            // (self.devices if self.sharded else 1)
        )

    def _sync_buffer_bytes(self, unit: int) -> int:
        """Bytes of the buffers for syncing weights: copies of the largest unit in the sampler's dtype, or a bucket."""
        if isinstance(self.sampler, VLLMServerSampler):
            return BUCKET_BYTES
        return 2 * DTYPE_BYTES[self.sampler.dtype] * unit

    def _reward_bytes(self) -> int:
        return reward_bytes(self.options.reward)

    def seconds(self, response_tokens: float, tokens_per_s: float, tflops: float, prompts: int) -> dict[str, float]:
        """Seconds of a round by phase. Scoring counts reward models in this process only.

        Args:
            response_tokens: Mean length of a response.
            tokens_per_s: Throughput of an engine.
            tflops: Throughput of a device in training, TFLOP/s.
            prompts: Prompts of the round.
        """
        responses = prompts * self.options.sampling.num_responses
        engines = max(1, self.devices // self.sampler.ranks_per_engine)
        if isinstance(self.sampler, VLLMServerSampler):
            engines = len(self.sampler.urls)
        row = self.data.max_prompt_tokens / 2 + response_tokens
        others = self.used - 1
        shares = self.module.attn_implementation == "sdpa"
        used_tokens = prompts * (row + others * response_tokens if shares else self.used * row)
        models = sum(name in self.module.needs for name in ("old_logps", "reference_logps"))
        per_token = 6 if self.module.lora is None and self.module.trainable_layers is None else 4
        per_token += 2 * self.module.gradient_checkpointing
        speed = tflops * 1e12 * self.devices
        reward = self._reward_bytes() / 2  # approximate number of parameters
        return {
            "generate": responses * response_tokens / (tokens_per_s * engines),
            "score": 2 * reward * responses * row / speed,
            "log-probs": 2 * models * self.model.total * used_tokens / speed,
            "train": per_token * self.model.total * self.data.passes * used_tokens / speed,
        }


def _show(plan: _Plan, available: float, own: argparse.Namespace, keep_rounds: int) -> int:
    memory = plan.memory(available)
    model = plan.model
    where = "GPU" if plan.on_gpu else "CPU process"
    console.print(
        f"{plan.module.source.path}: {model.total / 1e6:,.0f} M parameters, {model.trainable / 1e6:,.1f} M train; "
        f"{plan.devices} x {where}{', sharded' if plan.sharded else ''}; rows of up to {plan.longest} tokens",
        soft_wrap=True,
    )
    parts = list(dict.fromkeys(part for phase in _PHASES for part, held in memory[phase].items() if held))
    table = Table("memory per device", *_PHASES, title="Memory at each phase's peak")
    for part in parts:
        table.add_row(
            part, *(format_bytes(memory[phase][part]) if memory[phase].get(part) else "" for phase in _PHASES)
        )
    totals = {phase: sum(memory[phase].values()) for phase in _PHASES}
    table.add_row("sum", *(format_bytes(totals[phase]) for phase in _PHASES), style="bold")
    console.print(table)
    host = Table("host memory", "rank 0", "each other rank")
    host.add_row(f"{plan.module.source.path} while loading", *(format_bytes(n) for n in plan.host_memory()))
    host.add_row("the policy before the round, while it trains", *[format_bytes(plan.snapshot_bytes())] * 2)
    console.print(host)
    console.print(_disk(plan.checkpoint(), keep_rounds))
    tokens_per_s = own.generate_tokens_per_s or (3000.0 if plan.on_gpu else 200.0)
    tflops = own.tflops or (150.0 if plan.on_gpu else 0.05)
    mean = own.response_tokens or plan.options.sampling.max_response_tokens / 2
    prompts = plan.data.prompts_per_round
    per = "a round" if prompts else "1,000 prompts"
    seconds = plan.seconds(mean, tokens_per_s, tflops, prompts or 1000)
    times = Table(f"time, {per}", *seconds, "sum", title="Time")
    times.add_row("seconds", *(f"{s:,.0f}" for s in seconds.values()), f"{sum(seconds.values()):,.0f}")
    console.print(times)
    console.print(
        f"Assumed: {tokens_per_s:,.0f} tokens/s an engine, {tflops:g} TFLOP/s a device, responses of {mean:.0f} "
        "tokens, prompts of half the maximum length. Memory counts tensors, without the process itself and the "
        "allocator.",
        soft_wrap=True,
    )
    worst = max(totals, key=lambda phase: totals[phase])
    if totals[worst] <= available:
        console.print(f"Fits: the peak ({worst}) takes {totals[worst] / available:.0%} of {format_bytes(available)}.")
        return 0
    part = max(memory[worst], key=lambda name: memory[worst][name])
    hint = {**_HINTS["train"], **_HINTS[worst]}.get(part, "more devices, or a smaller model")
    console.print(
        f"Does not fit: {worst} takes {format_bytes(totals[worst])} of {format_bytes(available)}; the largest part is "
        f"{part}, {format_bytes(memory[worst][part])}. Change first: {hint}.",
        soft_wrap=True,
    )
    return 1


def _disk(checkpoint: int, keep_rounds: int) -> Table:
    """A table of the run directory's disk space. Every round writes at least two checkpoints."""
    table = Table("disk", "size")
    table.add_row("a checkpoint", format_bytes(checkpoint))
    if keep_rounds == -1:
        table.add_row("checkpoints, one a round", format_bytes(checkpoint))
        table.add_row(f"{CHECKPOINTS} more at a round's end", format_bytes(CHECKPOINTS * checkpoint))
    else:
        most = keep_rounds + CHECKPOINTS
        table.add_row(f"checkpoints at a round's end, at most {most}", format_bytes(most * checkpoint))
    return table


def _count_devices(devices: Any) -> int:
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else max(1, torch.cuda.device_count())


def _available_memory(on_gpu: bool) -> float:
    if on_gpu and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    if on_gpu:
        return 80 * 2**30
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
