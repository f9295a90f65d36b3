"""`rlhf-pl plan`: estimates memory and time of a config, without loading weights."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from rlhf_pl.cli.fit import RlhfCLI
from rlhf_pl.cli.option_numbers import refuse_not_finite
from rlhf_pl.cli.parser_errors import CommandParser
from rlhf_pl.cli.plan_estimates import Plan, PlannedModule
from rlhf_pl.cli.plan_prompts import count_prompts
from rlhf_pl.data import RoundDataModule
from rlhf_pl.data.policy_module import find_missing_members, is_policy_module
from rlhf_pl.models.config_files import has_weights
from rlhf_pl.models.policy import check_lm
from rlhf_pl.models.value_model import check_critic
from rlhf_pl.rewards.armorm import ArmoRMReward
from rlhf_pl.rewards.classifier import ClassifierReward
from rlhf_pl.rounds.disk_space import CHECKPOINTS
from rlhf_pl.utils.console import console
from rlhf_pl.utils.disk import format_bytes
from rlhf_pl.utils.errors import InputError

_SMALLER_CRITIC = "--model.critic.lora LoRA, or --model.critic.shares_trunk true"
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
    plan = Plan(cli.model, cli.datamodule, cli.options, cli.settings, cli._get(cli.config_init, "rollout"))
    available = own.device_memory_gib * 2**30 if own.device_memory_gib else _available_memory(plan.on_gpu)
    return _show(plan, available, own, cli.keep_rounds)


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


def _show(plan: Plan, available: float, own: argparse.Namespace, keep_rounds: int) -> int:
    memory = plan.memory(available)
    model = plan.model
    where = "GPU" if plan.on_gpu else "CPU process"
    critic = "" if plan.critic is None else f"critic {plan.critic.size.total / 1e6:,.1f} M, "
    critic += "" if plan.critic is None else f"{plan.critic.size.trainable / 1e6:,.1f} M train; "
    console.print(
        f"{plan.module.source.path}: {model.total / 1e6:,.0f} M parameters, {model.trainable / 1e6:,.1f} M train; "
        f"{critic}{plan.devices} x {where}{', sharded' if plan.sharded else ''}; rows of up to {plan.longest} tokens",
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
    console.print(_disk(plan.checkpoint(), keep_rounds))
    tokens_per_s = own.generate_tokens_per_s or (3000.0 if plan.on_gpu else 200.0)
    tflops = own.tflops or (150.0 if plan.on_gpu else 0.05)
    mean = own.response_tokens or plan.options.sampling.max_response_tokens / 2
    prompts = count_prompts(plan.data)
    per = f"a round of {prompts:,} prompts" if prompts else "1,000 prompts"
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


def _available_memory(on_gpu: bool) -> float:
    if on_gpu and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    if on_gpu:
        return 80 * 2**30
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
