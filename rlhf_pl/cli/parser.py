"""The parser of `rlhf-pl fit`: help that includes the default classes, and short errors."""

import inspect
import re
import sys
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from rlhf_pl.cli.given_options import GivenOptions
from rlhf_pl.cli.own_classes import leave_out_rollout, replace_classes
from rlhf_pl.cli.parser_errors import FOR_ALL_COMMANDS, exit_with_error
from rlhf_pl.cli.short_help import short_help
from rlhf_pl.cli.suggestions import explain
from rlhf_pl.cli.value_errors import explain_value
from rlhf_pl.data import RoundDataModule
from rlhf_pl.modules import RebelModule
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import HIDDEN, hidden_options, redacted, register_options

_CLASS_HELP = re.compile(r"Help for (?P<option>--\S+?)\.help(=|\s+)(?P<name>\S+)")
DEFAULT_CLASSES = {"model": RebelModule, "data": RoundDataModule}


class Parser(LightningArgumentParser):
    """LightningCLI's parser with short errors instead of a page of usage, and help on the default classes."""

    shows_all = False  # set by `--help_all`
    trainer_defaults: ClassVar[dict[str, Any]] = {}  # of the command, for the help
    arguments: ClassVar[list[str]] = []  # the command line, for errors
    shows_secrets = False  # shared by all parsers: they dump each other's parts

    def format_help(self, formatter: Any = None) -> str:
        text = super().format_help(formatter)
        if (named := _CLASS_HELP.match(str(self.description))) is not None:
            return _class_help(text, named["option"], named["name"])
        if not {"--model", "--trainer"} <= self._option_string_actions.keys():  # the help of one class or section
            return text
        if not self.shows_all:
            return short_help(self.trainer_defaults) + FOR_ALL_COMMANDS
        for key, kind in DEFAULT_CLASSES.items():
            section = ArgumentParser()
            section.add_class_arguments(kind, key, fail_untyped=False)
            _usage, _options, group = section.format_help().split("\n\n", 2)
            text += f"\n{kind.__name__}, the default `{key}`:\n" + group.split("\n", 1)[1]
        return text + FOR_ALL_COMMANDS

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """Serialize a config for the terminal or a file, without its secrets."""
        if self.shows_secrets:
            return super().dump(namespace, *args, **kwargs)
        return super().dump(redacted(namespace), *args, **kwargs | {"skip_validation": True})

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """Instantiate with this package's subclasses of some Lightning classes. A dumped config keeps the user's."""
        return super().instantiate_classes(leave_out_rollout(replace_classes(cfg)), **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text, given = str(message), GivenOptions(self.arguments)
        named = explain_value(text, given) or explain(re.sub(r"required: (\w+)$", _full_name, text), given)
        exit_with_error(named, "fit", ex)


def _class_help(text: str, option: str, name: str) -> str:
    """The help of one class, as `--model.help PPOModule` shows it, with its options as they are typed.

    Args:
        text: The help that jsonargparse makes; an option inside another class lacks its prefix.
        option: The option that takes the class, without the prefix.
        name: The class.
    """
    given = (argument.partition("=")[0].removesuffix(".help") for argument in sys.argv if ".help" in argument)
    full = next((each for each in given if each.endswith(f".{option.removeprefix('--')}")), option)
    options = text.split("\n\n", 2)[-1]
    if full != option:
        options = re.sub(rf"(?<=\s){re.escape(option)}(?=[.\s])", full, options)
    short = name.rpartition(".")[2] if name.startswith("rlhf_pl.") else name
    return f"usage: rlhf-pl fit {full} {short} [options]\n\n{options}"


def _full_name(required: re.Match[str]) -> str:
    """The full option of a missing argument, such as `required: --model.policy`."""
    name = required[1]
    key = next((k for k, kind in DEFAULT_CLASSES.items() if name in inspect.signature(kind).parameters), None)
    return f"required: --{key}.{name}" if key else required[0]


def register_config_secrets(config: Any) -> None:
    """Hide the secrets of a parsed config from now on.

    Raises:
        InputError: The config was written by a run, which has removed its secrets.
    """
    register_options(config)
    if options := hidden_options(config):
        named = ", ".join(f"`{option.removeprefix('fit.')}`" for option in options)
        raise InputError(
            f"{named}: is {HIDDEN}, which replaces keys, tokens and passwords in a run's config.yaml and in "
            "--print_config. Set it with its flag or in a second --config file after the first, or run the run's own "
            "command."
        )
