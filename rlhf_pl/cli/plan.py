"""`rlhf-pl plan`: estimates memory and time of a config, without loading weights."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pl.cli.fit import RlhfCLI
from rlhf_pl.cli.group_help import group_help
from rlhf_pl.cli.option_numbers import refuse_not_finite
from rlhf_pl.cli.parser_errors import CommandParser
from rlhf_pl.cli.plan_disk import DiskOptions, stored_responses
from rlhf_pl.cli.plan_estimates import Plan, PlannedModule
from rlhf_pl.cli.plan_fixed import FixedPlan
from rlhf_pl.cli.plan_machine import GPU_TFLOPS, GPU_TOKENS_PER_S, device_bytes, measure_cpu_tflops
from rlhf_pl.cli.plan_prompts import plan_prompts
from rlhf_pl.cli.plan_rows import plan_rows
from rlhf_pl.cli.plan_show import show_disk, show_header, show_memory, show_times, show_verdict
from rlhf_pl.cli.plan_trainer import PlannedTrainer, plan_trainer
from rlhf_pl.data import OfflineDataModule, PreferenceDataModule, RoundDataModule, SFTDataModule
from rlhf_pl.data.policy_module import find_missing_members, is_policy_module
from rlhf_pl.data.preference_batches import PreferenceBatch
from rlhf_pl.data.sft_batches import SFTBatch
from rlhf_pl.models.config_files import has_weights
from rlhf_pl.models.policy import check_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.models.value_model import check_critic
from rlhf_pl.modules.base import TrainedModule
from rlhf_pl.rewards.armorm import ArmoRMReward
from rlhf_pl.rewards.classifier import ClassifierReward
from rlhf_pl.utils.console import console
from rlhf_pl.utils.cpu_threads import describe_overload
from rlhf_pl.utils.errors import InputError

_NO_FOLDER = "If another run is to write this model, name the one that that run starts from: a plan needs no weights."
_NO_CONFIG = (
    "A plan needs no weights: instead of a Hub id, give a folder with the model's config.json, and with its "
    "tokenizer's files for exact lengths."
)
_BATCHES: dict[type, type] = {SFTDataModule: SFTBatch, PreferenceDataModule: PreferenceBatch}
_EXAMPLE = """\
rlhf-pl plan --config configs/quickstart.yaml
rlhf-pl plan --config configs/tutorial/sft.yaml
rlhf-pl plan --config mine.yaml --trainer.devices 8 --device_memory_gib 80
rlhf-pl plan --config mine.yaml --trainer.accelerator cpu --response_tokens 60
"""


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
        checkpoint, export = (self._get(self.config_init, group) for group in ("checkpoint", "export"))
        saves = self.settings["enable_checkpointing"] is not False
        self.disk = DiskOptions(checkpoint.keep_rounds if saves else None, export.every_round, export.dtype)
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
        help="memory of a device, GiB, which means GPUs unless the config or --trainer.accelerator says cpu; default: "
        "that of this machine's GPU, 80 for GPUs elsewhere, or a CPU process's share of this machine's",
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
    if text := group_help(argv):
        print(text, end="")
        return 0
    own, rest = parser.parse_known_args(list(argv))
    refuse_not_finite(vars(own))
    cli = _PlannedCLI(["fit", *rest])
    machine = plan_trainer(cli.settings, own.device_memory_gib is not None)
    _check_models(cli.model, cli.options.reward if cli.options else None)
    if isinstance(cli.datamodule, RoundDataModule):
        return _plan_rounds(cli, machine, own)
    return _plan_fixed(cli, machine, own)


def _plan_rounds(cli: _PlannedCLI, machine: PlannedTrainer, own: argparse.Namespace) -> int:
    if not cli.options:
        raise InputError(
            "`rollout.reward` is missing, which a plan of a run in rounds needs: a Reward class, or the import path of "
            "a Python function."
        )
    if missing := find_missing_members(cli.model, PlannedModule):
        raise InputError(f"`model`: {type(cli.model).__name__} lacks {', '.join(missing)}, which a plan needs.")
    prompts = plan_prompts(cli.model, cli.datamodule)
    plan = Plan(cli.model, cli.datamodule, cli.options, machine, cli._get(cli.config_init, "rollout"), prompts)
    available = _available(own, machine)
    memory = plan.memory(available)
    mean = own.response_tokens or plan.options.sampling.max_response_tokens / 2
    show_header(plan)
    show_memory(plan, memory)
    show_disk(plan, cli.disk, stored_responses(plan, prompts.count if prompts.is_known else None, mean))
    _show_time_of_rounds(plan, mean, own)
    return show_verdict(plan, memory, available, own.device_memory_gib is not None)


def _plan_fixed(cli: _PlannedCLI, machine: PlannedTrainer, own: argparse.Namespace) -> int:
    module, data = cli.model, cli.datamodule
    if not isinstance(data, SFTDataModule | PreferenceDataModule | OfflineDataModule) or not isinstance(
        module, TrainedModule
    ):
        raise InputError(
            f"`rlhf-pl plan` knows this package's DataModules and modules, not {type(module).__name__} on "
            f"{type(data).__name__}. The phase `train` of a plan for a model and batches of that size is close to it."
        )
    if module.batch_type is not _BATCHES.get(type(data), module.batch_type):
        raise InputError(
            f"`data`: {type(data).__name__} does not provide what {type(module).__name__} trains on, "
            f"{module.batch_type.__name__}."
        )
    rows = plan_rows(module, data)
    plan = FixedPlan(module, data, machine, rows)
    available = _available(own, machine)
    memory = plan.memory(available)
    show_header(plan)
    show_memory(plan, memory)
    show_disk(plan, cli.disk, {})
    _show_time_of_epochs(plan, own)
    return show_verdict(plan, memory, available, own.device_memory_gib is not None)


def _available(own: argparse.Namespace, machine: PlannedTrainer) -> float:
    """Memory of a device, bytes."""
    if own.device_memory_gib is not None:
        return float(own.device_memory_gib) * 2**30
    return device_bytes(machine.on_gpu, machine.processes)


def _check_models(module: Any, reward: Any) -> None:
    """Refuse damaged models as `fit` does, if their weights are in a local folder. A plan needs no weights."""
    if isinstance(source := getattr(module, "source", None), ModelSource):
        _check_config(source)
    if isinstance(module, TrainedModule) and not is_policy_module(module) and has_weights(Path(module.source.path)):
        module.check_source()
    if is_policy_module(module):
        for source in {id(s): s for s in (module.source, module.reference_source)}.values():
            _check_config(source)
            if has_weights(Path(source.path)):
                check_lm(source)
    critic = getattr(module, "critic_source", None)
    if critic is not None and not module.critic_options.shares_trunk:
        _check_config(critic)
        check_critic(critic, module.source, None, has_weights(Path(critic.path)))
    for part in getattr(reward, "parts", [reward]):
        if isinstance(part, ClassifierReward | ArmoRMReward) and has_weights(Path(part.model)):
            part.check([])
        elif isinstance(source := getattr(part, "source", None), ModelSource):
            _check_config(source)


def _check_config(source: ModelSource) -> None:
    """Read a model's config; the error says what a plan needs of a model that is not here."""
    try:
        _ = source.config
    except InputError as error:
        if Path(source.path).exists():
            raise
        raise InputError(f"{error} {_NO_CONFIG if source.path.count('/') == 1 else _NO_FOLDER}") from error


def _speed(plan: Any, own: argparse.Namespace) -> tuple[float, str]:
    """TFLOP/s of a device, and how it was found."""
    if own.tflops is not None:
        return own.tflops, "given"
    if plan.machine.on_gpu:
        return GPU_TFLOPS, "assumed"
    measured = measure_cpu_tflops(plan.machine.bf16, plan.machine.processes)
    load = ", and now the machine is overloaded: these times are too long" if describe_overload() else ""
    return measured, f"measured just now; another load changes it{load}"


def _show_time_of_epochs(plan: FixedPlan, own: argparse.Namespace) -> None:
    """The seconds of an epoch, and what was assumed."""
    rows, (tflops, speed) = plan.rows, _speed(plan, own)
    seconds = plan.seconds(tflops)
    count = f"{rows.count:,}" if rows.is_known else f"{rows.count:,} (assumed)"
    show_times(f"an epoch of {count} {rows.noun}", seconds)
    updates, rank = plan.updates(), plan.machine
    size = f"{plan.data.batch_size} x {rank.accumulate} x {rank.devices} {rows.noun}"
    console.print(
        f"Time: {tflops:.3g} TFLOP/s a device ({speed}); {updates:,} update{'' if updates == 1 else 's'} an epoch of "
        f"{size} (batch_size x accumulation x devices); {rows.held_out:,} held out"
        f"{'; the log-probs are computed once' if 'log-probs' in seconds else ''}. Memory: a micro-batch of the "
        f"longest rows, without the process itself and the allocator. Lengths: {rows.source}.",
        soft_wrap=True,
    )


def _show_time_of_rounds(plan: Plan, mean: float, own: argparse.Namespace) -> None:
    """The seconds of a round, and what was assumed.

    Args:
        plan: The plan.
        mean: Mean length of a response, tokens.
        own: The command's own options.
    """
    tokens_per_s, (tflops, speed) = own.generate_tokens_per_s, _speed(plan, own)
    if tokens_per_s is None:  # on a CPU a token takes two FLOPs a parameter, as in training
        tokens_per_s = GPU_TOKENS_PER_S if plan.machine.on_gpu else tflops * 1e12 / (2 * plan.model.total)
    prompts, most = plan.prompts, plan.options.sampling.max_response_tokens
    seconds = plan.seconds(mean, tokens_per_s, tflops)
    per = f"a round of {prompts.count:,} prompts" if prompts.is_known else "1,000 prompts"
    show_times(per, seconds)
    share = "" if own.response_tokens else f" ({mean / most:.0%} of the maximum, assumed: --response_tokens)"
    console.print(
        f"Time: typical prompts of {prompts.typical:,.0f} tokens and responses of {mean:,.0f}{share}; "
        f"{tokens_per_s:,.0f} tokens/s an engine, {tflops:.3g} TFLOP/s a device ({speed}); {prompts.held_out:,} "
        f"held-out prompts x {plan.val_responses}. Memory: the worst case of a micro-batch, prompts of "
        f"{prompts.longest:,} tokens and responses of {most:,}. Lengths: {prompts.source}. Memory counts tensors, "
        "without the process itself and the allocator.",
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
