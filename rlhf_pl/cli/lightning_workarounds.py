"""Changes to jsonargparse and Lightning. Only the command line imports this module, so notebooks are not affected."""

from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import _typehints, set_loader
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import StrategyRegistry

from rlhf_pl.cli.config_text import load_yaml
from rlhf_pl.cli.own_classes import RUN_DIRECTORY
from rlhf_pl.distributed.strategies import FSDP2Strategy

_discard = _typehints.discard_init_args_on_class_path_change


def install() -> None:
    """Read config files strictly, drop the defaults of a replaced class, register the strategy `fsdp2`, and let loggers
    write to the run directory if the config names none.

    Changes jsonargparse and Lightning in this process. A second call has no effect.
    """
    set_loader("yaml", load_yaml, (yaml.YAMLError,))
    _typehints.discard_init_args_on_class_path_change = _drop_defaults
    for kind in (CSVLogger, TensorBoardLogger, WandbLogger):
        _set_default(kind.__init__, "save_dir", RUN_DIRECTORY)
    if "fsdp2" not in StrategyRegistry:
        StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2: fully_shard over all devices")


def _drop_defaults(parser_or_action: Any, before: Any, now: Any) -> None:
    """Drop the defaults of the previous class when another one is chosen: its learning rate does not fit the new one.

    jsonargparse keeps all options that both classes have. Options that the user has set are still kept.
    """
    if before and before.get("init_args") and before["class_path"] != now["class_path"]:
        defaults = _typehints.ActionTypeHint.get_class_parser(before["class_path"], {}).get_defaults()
        for name in list(vars(before["init_args"])):
            if name in defaults and before["init_args"][name] == defaults[name]:
                del before["init_args"][name]
    _discard(parser_or_action, before, now)


def _set_default(function: Any, name: str, default: str) -> None:
    """Give a function's parameter, after which all have one, a default or another one: jsonargparse reads it."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    given = function.__defaults__ or ()
    defaults = {**dict(zip(names[len(names) - len(given) :], given, strict=True)), name: default}
    function.__defaults__ = tuple(defaults[each] for each in names if each in defaults)
