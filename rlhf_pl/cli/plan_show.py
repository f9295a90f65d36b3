"""The tables and sentences of `rlhf-pl plan` that all kinds of runs have."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from rlhf_pl.cli.plan_disk import DiskOptions, disk_parts, disk_table, lacks_space
from rlhf_pl.utils.console import console
from rlhf_pl.utils.disk import format_bytes

_SMALLER_CRITIC = "--model.critic.lora LoRA, or --model.critic.shares_trunk true"
_HINTS: dict[str, dict[str, str]] = {
    "train": {
        "activations": "--model.gradient_checkpointing true, or a smaller --data.batch_size with more accumulation",
        "output head": "a smaller --model.logprob_chunk_tokens",
        "copies in bf16": "--model.dtype bfloat16 with --trainer.precision 32-true",
        "optimizer": "--trainer.strategy fsdp2 over more devices, or --model.lora LoRA",
        "gradients": "--trainer.strategy fsdp2 over more devices, or --model.lora LoRA",
        "parameters": "--trainer.strategy fsdp2 over more devices",
        **dict.fromkeys(("critic parameters", "critic gradients", "critic optimizer"), _SMALLER_CRITIC),
        "critic activations": "--model.gradient_checkpointing true, or a smaller --data.batch_size with more "
        "accumulation",
    },
    "generate": {"sampler": "--rollout.sampler.tensor_parallel_size, or a smaller gpu_memory_utilization"},
    "score": {"reward model": "a reward model under `vllm serve` (VLLMServerReward), or a smaller dtype"},
    "sync": {"gathered unit": "more devices; a smaller part than a unit can't be gathered"},
}


def show_header(plan: Any) -> None:
    """Print the model, the devices and the length of rows."""
    model, machine = plan.model, plan.machine
    where = "GPU" if machine.on_gpu else "CPU process"
    critic = "" if plan.critic is None else f"critic {plan.critic.size.total / 1e6:,.1f} M, "
    critic += "" if plan.critic is None else f"{plan.critic.size.trainable / 1e6:,.1f} M train; "
    console.print(
        f"{plan.module.source.path}: {model.total / 1e6:,.0f} M parameters, {model.trainable / 1e6:,.1f} M train; "
        f"{critic}{machine.devices} x {where}{', sharded' if machine.sharded else ''}; "
        f"{plan.rows_text}",
        soft_wrap=True,
    )
    if machine.is_elsewhere:
        console.print(
            "--device_memory_gib is given, so this is a plan for GPUs, although none is here. For CPU processes of "
            "that memory: `--trainer.accelerator cpu`.",
            soft_wrap=True,
        )
    if machine.chooses_cpu:
        console.print(
            f"No GPU is here, so `fit` would start {machine.devices} CPU processes. For a machine with GPUs: "
            "`--trainer.accelerator gpu`, or --device_memory_gib with a GPU's memory.",
            soft_wrap=True,
        )


def show_memory(plan: Any, memory: Mapping[str, Mapping[str, int]]) -> None:
    """Print the tables of the devices' memory and of the host's.

    Args:
        plan: The plan.
        memory: Bytes per device by phase and part.
    """
    phases = list(memory)
    parts = list(dict.fromkeys(part for held in memory.values() for part, size in held.items() if size))
    table = Table("memory per device", *phases, title="Memory at each phase's peak")
    for part in parts:
        table.add_row(part, *(format_bytes(memory[phase][part]) if memory[phase].get(part) else "" for phase in phases))
    table.add_row("sum", *(format_bytes(sum(memory[phase].values())) for phase in phases), style="bold")
    console.print(table)
    host = Table("host memory", "rank 0", "each other rank")
    for name, sizes in plan.host_memory().items():
        host.add_row(name, *map(format_bytes, sizes))
    console.print(host)


def show_disk(plan: Any, options: DiskOptions, stored: Mapping[str, tuple[int, int]]) -> None:
    """Print the disk space of the run directory, and a sentence where it is too little.

    Args:
        plan: The plan.
        options: The options of checkpoints and exports.
        stored: Bytes of what else is stored, at the peak and at the end.
    """
    run_dir, disk = plan.machine.run_dir, {**disk_parts(plan, options), **stored}
    console.print(disk_table(disk, plan.checkpoint(), run_dir))
    if problem := lacks_space(disk, run_dir, options.keep_rounds):
        console.print(problem, soft_wrap=True)


def show_times(per: str, seconds: Mapping[str, float]) -> None:
    """Print the table of times.

    Args:
        per: What takes that long.
        seconds: Seconds by phase.
    """
    columns = {**seconds, **({"sum": sum(seconds.values())} if len(seconds) > 1 else {})}
    times = Table(f"time, {per}", *columns, title="Time")
    times.add_row("seconds", *map(_format_seconds, columns.values()))
    console.print(times)


def _format_seconds(seconds: float) -> str:
    """Seconds without a fraction, or with one digit of it where they are few."""
    if 0 < seconds < 0.05:
        return "< 0.1"
    return f"{seconds:.1f}" if 0 < seconds < 9.95 else f"{seconds:,.0f}"


def show_verdict(plan: Any, memory: Mapping[str, Mapping[str, int]], available: float, is_given: bool) -> int:
    """Print whether the plan fits, and otherwise what to change. Return the exit code.

    Args:
        plan: The plan.
        memory: Bytes per device by phase and part.
        available: Memory of a device, bytes.
        is_given: Whether the user has given that.
    """
    machine = plan.machine
    of = "" if machine.on_gpu or is_given else _share_of_machine(machine.processes)
    totals = {phase: sum(parts.values()) for phase, parts in memory.items()}
    worst = max(totals, key=lambda phase: totals[phase])
    if totals[worst] <= available:
        console.print(
            f"Fits: the peak ({worst}) takes {totals[worst] / available:.0%} of {format_bytes(available)}{of}.",
            soft_wrap=True,
        )
        return 0
    part = max(memory[worst], key=lambda name: memory[worst][name])
    hint = {**_HINTS["train"], **_HINTS[worst]}.get(part, "more devices, or a smaller model")
    console.print(
        f"Does not fit: {worst} takes {format_bytes(totals[worst])} of {format_bytes(available)}{of}; the largest part "
        f"is {part}, {format_bytes(memory[worst][part])}. Change first: {hint}.",
        soft_wrap=True,
    )
    return 1


def _share_of_machine(processes: int) -> str:
    return ", this machine's memory" if processes == 1 else f", this machine's memory for each of {processes} processes"
