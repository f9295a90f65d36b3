"""The classes that replace Lightning's in a config."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from rlhf_pl import CPUFSDPStrategy, FSDP2Strategy
from rlhf_pl.cli import lightning_workarounds
from rlhf_pl.cli.fit import RlhfCLI
from rlhf_pl.cli.own_classes import replace_classes
from rlhf_pl.trainer.options import listed
from rlhf_pl.trainer.run_loggers import RunCSVLogger, RunLogger


class MyFSDP(FSDPStrategy): ...


class MyLogger(CSVLogger): ...


def named(kind: type, **arguments: Any) -> Namespace:
    return Namespace(class_path=f"{kind.__module__}.{kind.__qualname__}", init_args=Namespace(**arguments))


def own(strategy: Any = "auto", logger: Any = None, gpu: bool = False) -> Any:
    config = Namespace(
        subcommand="fit", fit=Namespace(trainer=Namespace(strategy=strategy, logger=logger, accelerator="auto"))
    )
    before = str(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: gpu)
        found = replace_classes(config)
    assert str(config) == before  # config.yaml keeps the user's classes
    return found.fit.trainer


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload"])
def test_fsdp_runs_on_cpus(name: str) -> None:
    assert own(name).strategy == named(CPUFSDPStrategy)
    assert own(name, gpu=True).strategy == name
    given = named(FSDPStrategy, sharding_strategy="SHARD_GRAD_OP")
    assert own(given).strategy == named(CPUFSDPStrategy, sharding_strategy="SHARD_GRAD_OP")
    assert own(given, gpu=True).strategy == given


@pytest.mark.parametrize("gpu", [True, False])
def test_a_model_parallel_strategy_without_sizes_is_fsdp2(gpu: bool) -> None:
    sizes = {"data_parallel_size": "auto", "tensor_parallel_size": "auto"}
    assert own(named(ModelParallelStrategy, **sizes, timeout=9), gpu=gpu).strategy == named(
        FSDP2Strategy, **sizes, timeout=9
    )
    given = named(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1)
    assert own(given, gpu=gpu).strategy == given


@pytest.mark.parametrize("given", ["auto", "ddp", "fsdp2", named(DDPStrategy), named(MyFSDP)])
def test_other_strategies_are_not_replaced(given: Any) -> None:
    assert own(given).strategy == given


def test_loggers_that_continue_files_replace_lightnings() -> None:
    csv, board = named(CSVLogger, save_dir="logs"), named(TensorBoardLogger, save_dir="logs")
    assert own(logger=csv).logger == named(RunCSVLogger, save_dir="logs")
    assert own(logger=[board, csv]).logger == [
        named(RunLogger, save_dir="logs"),
        named(RunCSVLogger, save_dir="logs"),
    ]
    for given in (None, True, False, named(MyLogger, save_dir="logs")):
        assert own(logger=given).logger == given


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (["CSVLogger"], ["runs/mine"]),
        (["lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "elsewhere"], ["elsewhere"]),
        (
            ["[{class_path: CSVLogger}, {class_path: TensorBoardLogger, init_args: {save_dir: tb}}]"],
            ["runs/mine", "tb"],
        ),
        (["false"], []),
    ],
)
def test_loggers_write_to_the_run_directory_unless_the_config_names_another(
    llama: Path, given: list[str], folders: list[str]
) -> None:
    class Built(RlhfCLI):
        """Builds the parts of a run, and runs nothing."""

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            self.loggers = listed(self._get(self.config_init, "trainer").logger or None)

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    lightning_workarounds.install()
    arguments = ["--model.policy", str(llama), "--data.prompts", "x.jsonl", "--trainer.default_root_dir", "runs/mine"]
    cli = Built(["fit", *arguments, "--trainer.logger", *given])
    assert [logger.save_dir for logger in cli.loggers] == folders
