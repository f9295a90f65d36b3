"""The parser of `rlhf-pl fit`: help with the default classes, errors in a few lines."""

import inspect
import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from rlhf_pl.cli.own_classes import with_own_classes
from rlhf_pl.cli.parser_errors import FOR_ALL_COMMANDS, exit_with_error
from rlhf_pl.data import RoundDataModule
from rlhf_pl.modules import RebelModule
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import HIDDEN, hidden_options, learn_options, redacted

DEFAULT_CLASSES = {"model": RebelModule, "data": RoundDataModule}


class Parser(LightningArgumentParser):
    """Errors in a few lines instead of after a page of usage, and a help that includes the default classes."""

    shows_secrets = False  # of all parsers: they dump each other's parts

    def format_help(self, formatter: Any = None) -> str:
        text = super().format_help(formatter)
        if "--model" not in self._option_string_actions:
            return text
        for key, kind in DEFAULT_CLASSES.items():
            section = ArgumentParser()
            section.add_class_arguments(kind, key, fail_untyped=False)
            _usage, _options, group = section.format_help().split("\n\n", 2)
            text += f"\n{kind.__name__}, the default `{key}`:\n" + group.split("\n", 1)[1]
        return text + FOR_ALL_COMMANDS

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """What is shown or written of a config, so without its secrets."""
        if self.shows_secrets:
            return super().dump(namespace, *args, **kwargs)
        return super().dump(redacted(namespace), *args, **kwargs | {"skip_validation": True})

    def instantiate_classes(self, cfg: Any, **kwargs: Any) -> Any:
        """With our classes in place of some of Lightning's; what is shown and written keeps the user's."""
        return super().instantiate_classes(with_own_classes(cfg), **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        exit_with_error(re.sub(r"required: (\w+)$", _full_name, str(message)), "fit", ex)


def _full_name(required: re.Match[str]) -> str:
    """A missing argument of a class as the option that gives it."""
    name = required[1]
    key = next((k for k, kind in DEFAULT_CLASSES.items() if name in inspect.signature(kind).parameters), None)
    return f"required: --{key}.{name}" if key else required[0]


def take_secrets(config: Any) -> None:
    """Hide the secrets of a parsed config from now on.

    Raises:
        InputError: It was written by a run, which has left them out.
    """
    learn_options(config)
    if options := hidden_options(config):
        named = ", ".join(f"`{option.removeprefix('fit.')}`" for option in options)
        raise InputError(
            f"{named}: holds {HIDDEN}, which stands in a run's config.yaml and in --print_config where a key, token or "
            "password was given. Give it again, by its flag or in a second --config file behind the first; or give "
            "the run's own command."
        )
