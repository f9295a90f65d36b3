"""`rlhf-pl plan`: estimates memory and time of a config, without loading weights."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rlhf_pl.cli.fit import RlhfCLI
from rlhf_pl.cli.option_numbers import refuse_not_finite
from rlhf_pl.cli.parser_errors import CommandParser
from rlhf_pl.cli.plan_disk import disk_parts, disk_table, lacks_space
from rlhf_pl.cli.plan_estimates import Plan, PlannedModule
from rlhf_pl.cli.plan_machine import GPU_TFLOPS, GPU_TOKENS_PER_S, device_bytes, measure_cpu_tflops
from rlhf_pl.cli.plan_prompts import plan_prompts
from rlhf_pl.data import RoundDataModule
from rlhf_pl.data.policy_module import find_missing_members, is_policy_module
from rlhf_pl.models.config_files import has_weights
from rlhf_pl.models.policy import check_lm
from rlhf_pl.models.value_model import check_critic
from rlhf_pl.rewards.armorm import ArmoRMReward
from rlhf_pl.rewards.classifier import ClassifierReward
from rlhf_pl.utils.console import console
from rlhf_pl.utils.disk import format_bytes
from rlhf_pl.utils.errors import InputError

_SMALLER_CRITIC = "--model.critic.lora LoRA, or --model.critic.shares_trunk true"
_EXAMPLE = """\
rlhf-pl plan --config configs/quickstart.yaml
rlhf-pl plan --config mine.yaml --trainer.accelerator gpu --trainer.devices 8 --device_memory_gib 80
rlhf-pl plan --config mine.yaml --trainer.accelerator cpu --response_tokens 60
"""
_PHASES = ("train", "generate", "score", "sync")
_HINTS = {
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


class _PlannedCLI(RlhfCLI):
    """Reads the config and builds model and data, but no Trainer: its devices need not be on this machine."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        self.settings = {**self._get(self.config_init, "trainer", default={})}
        if (rounds_from := self._get(self.config_init, "rounds_from")) is not None:
            raise InputError(
                f"`--rounds_from` is {rounds_from!r}, and `rlhf-pl plan` estimates runs that sample. Leave it out: of "
                "the plan then only the phase `train` and the seconds of `log-probs` and `train` count."
            )
        self.options = self._get(self.config_init, "rollout").options
        self.keep_rounds = self._get(self.config_init, "checkpoint").keep_rounds
        self.exports_rounds = self._get(self.config_init, "export").every_round
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


def run(argv: Sequence[str]) -> int:
    """Run `rlhf-pl plan --config x.yaml`: print tables. Return the exit code, 1 if the config does not fit."""
    parser = CommandParser(
        prog="rlhf-pl plan",
        usage="rlhf-pl plan --config FILE [options]",
        example=_EXAMPLE,
        description="Memory per device and time per phase of a `rlhf-pl fit` config, without loading weights.",
        epilog="All other options are those of `rlhf-pl fit`.",
    )
    parser.add_argument(
        "--device_memory_gib",
        type=float,
        metavar="X",
        help="memory of a device, GiB; default: that of this machine's GPU, 80 for GPUs elsewhere, or a CPU process's "
        "share of this machine's",
    )
    parser.add_argument(
        "--response_tokens",
        type=float,
        metavar="X",
        help="mean length of a response, tokens; default: half of the maximum",
    )
    parser.add_argument(
        "--generate_tokens_per_s",
        type=float,
        metavar="X",
        help="throughput of an engine; default: 3000, on a CPU what its speed allows for the model",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="X",
        help="throughput of a device in training, TFLOP/s; default: 150, on a CPU half of a matrix product's, measured",
    )
    own, rest = parser.parse_known_args(list(argv))
    refuse_not_finite(vars(own))
    cli = _PlannedCLI(["fit", *rest])
    if not is_policy_module(cli.model) or not isinstance(cli.datamodule, RoundDataModule) or not cli.options:
        raise InputError(
            f"`rlhf-pl plan` is for runs that sample: RebelModule or another policy, RoundDataModule and a "
            f"`rollout.reward`. {type(cli.model).__name__} on {type(cli.datamodule).__name__}"
            f"{'' if cli.options else ', without a reward,'} has no plan. Its memory "
            "is close to that of the phase `train` of a plan for the same model and "
            "`data.batch_size`, with prompts and responses of that length."
        )
    if missing := find_missing_members(cli.model, PlannedModule):
        raise InputError(f"`model`: {type(cli.model).__name__} lacks {', '.join(missing)}, which a plan needs.")
    _check_folders(cli.model, cli.options.reward)
    prompts = plan_prompts(cli.model, cli.datamodule)
    plan = Plan(cli.model, cli.datamodule, cli.options, cli.settings, cli._get(cli.config_init, "rollout"), prompts)
    memory = own.device_memory_gib
    available = memory * 2**30 if memory else device_bytes(plan.on_gpu, plan.processes)
    return _show(plan, available, own, cli)


def _check_folders(module: Any, reward: Any) -> None:
    """Refuse damaged models as `fit` does, if their weights are in a local folder. A plan needs no weights."""
    for source in {id(s): s for s in (module.source, module.reference_source)}.values():
        if has_weights(Path(source.path)):
            check_lm(source)
    critic = getattr(module, "critic_source", None)
    if critic is not None and not module.critic_options.shares_trunk:
        check_critic(critic, module.source, None, has_weights(Path(critic.path)))
    for part in getattr(reward, "parts", [reward]):
        if isinstance(part, ClassifierReward | ArmoRMReward) and has_weights(Path(part.model)):
            part.check([])


def _show(plan: Plan, available: float, own: argparse.Namespace, cli: _PlannedCLI) -> int:
    memory = plan.memory(available)
    model = plan.model
    where = "GPU" if plan.on_gpu else "CPU process"
    critic = "" if plan.critic is None else f"critic {plan.critic.size.total / 1e6:,.1f} M, "
    critic += "" if plan.critic is None else f"{plan.critic.size.trainable / 1e6:,.1f} M train; "
    console.print(
        f"{plan.module.source.path}: {model.total / 1e6:,.0f} M parameters, {model.trainable / 1e6:,.1f} M train; "
        f"{critic}{plan.devices} x {where}{', sharded' if plan.sharded else ''}; rows of up to {plan.longest:,} tokens",
        soft_wrap=True,
    )
    if not plan.on_gpu and plan.trainer["accelerator"] == "auto" and plan.devices > 1:
        console.print(
            f"No GPU is here, so `fit` would start {plan.devices} CPU processes. For a machine with GPUs: "
            "`--trainer.accelerator gpu`.",
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
    if plan.critic is not None and plan.critic.source is not None:
        name = f"{plan.critic.source.path} (critic) while loading"
        host.add_row(name, *(format_bytes(n) for n in plan.critic_host_memory()))
    host.add_row("the policy before the round, while it trains", *[format_bytes(plan.snapshot_bytes())] * 2)
    console.print(host)
    _show_disk(plan, own, cli)
    _show_time(plan, own)
    if refill := plan.options.refill:
        console.print(
            f"`rollout.refill` is {refill}: a round may sample up to {1 + refill} times its prompts, so generate and "
            f"score take up to {1 + refill} times as long.",
            soft_wrap=True,
        )
    if plan.has_mismatched:
        console.print(
            f"`model.loss` {type(plan.module.loss).__name__} needs the log-probs of responses to other prompts: a "
            f"second forward pass before each update, which makes training {plan.training_factor():.2f} times as long, "
            "and another one in the log-probs. Both are in the times above.",
            soft_wrap=True,
        )
    of = "" if plan.on_gpu or own.device_memory_gib else _share_of_machine(plan.processes)
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


def _show_disk(plan: Plan, own: argparse.Namespace, cli: _PlannedCLI) -> None:
    """The disk space of the run directory, and a sentence where it is too little."""
    mean, prompts = _mean_tokens(plan, own), plan.prompts
    run_dir, count = cli.settings["default_root_dir"], prompts.count if prompts.is_known else None
    disk = disk_parts(plan, cli.keep_rounds, cli.exports_rounds, cli.settings["max_epochs"], count, mean)
    console.print(disk_table(disk, plan.checkpoint(), run_dir))
    if problem := lacks_space(disk, run_dir):
        console.print(problem, soft_wrap=True)


def _mean_tokens(plan: Plan, own: argparse.Namespace) -> float:
    """Mean length of a response, tokens."""
    return own.response_tokens or plan.options.sampling.max_response_tokens / 2


def _show_time(plan: Plan, own: argparse.Namespace) -> None:
    """The seconds of a round, and what was assumed."""
    tflops, tokens_per_s = own.tflops, own.generate_tokens_per_s
    speed = "assumed" if plan.on_gpu else "given"
    if tflops is None and plan.on_gpu:
        tflops = GPU_TFLOPS
    elif tflops is None:
        tflops, speed = measure_cpu_tflops(plan.bf16, plan.processes), "measured just now; another load changes it"
    if tokens_per_s is None:  # on a CPU a token takes two FLOPs a parameter, as in training
        tokens_per_s = GPU_TOKENS_PER_S if plan.on_gpu else tflops * 1e12 / (2 * plan.model.total)
    prompts, most = plan.prompts, plan.options.sampling.max_response_tokens
    mean = _mean_tokens(plan, own)
    seconds = plan.seconds(mean, tokens_per_s, tflops)
    per = f"a round of {prompts.count:,} prompts" if prompts.is_known else "1,000 prompts"
    times = Table(f"time, {per}", *seconds, "sum", title="Time")
    times.add_row("seconds", *(f"{s:,.0f}" for s in seconds.values()), f"{sum(seconds.values()):,.0f}")
    console.print(times)
    share = "" if own.response_tokens else f" ({mean / most:.0%} of the maximum, assumed: --response_tokens)"
    console.print(
        f"Time: typical prompts of {prompts.typical:,.0f} tokens and responses of {mean:,.0f}{share}; "
        f"{tokens_per_s:,.0f} tokens/s an engine, {tflops:.3g} TFLOP/s a device ({speed}); {prompts.held_out:,} "
        f"held-out prompts x {plan.val_responses}. Memory: the worst case of a micro-batch, prompts of "
        f"{prompts.longest:,} tokens and responses of {most:,}. Lengths: {prompts.source}. Memory counts tensors, "
        "without the process itself and the allocator.",
        soft_wrap=True,
    )


def _share_of_machine(processes: int) -> str:
    return ", this machine's memory" if processes == 1 else f", this machine's memory for each of {processes} processes"
