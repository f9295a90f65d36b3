"""What is known of a model before its weights load: configs, tokenizer, files."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_pl.models.chat import eos_token_ids
from rlhf_pl.models.chat_template import variables_read
from rlhf_pl.models.config_files import (
    ADAPTER,
    CONFIG,
    MOST,
    check_sizes,
    check_token_ids,
    file_to_blame,
    small_file_problem,
)
from rlhf_pl.models.rotary import thresholds
from rlhf_pl.utils.errors import InputError


@dataclass(frozen=True)
class ModelSource:
    """A model folder or Hub id, and what its configs and tokenizer say. Loads no weights.

    Args:
        path: A folder in Hugging Face format, or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        trust_remote_code: Run Python code that comes with the model. Off unless you trust its authors.
        option: The option that names the model, for errors.
    """

    path: str
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    option: str = "model.policy"

    @property
    def _hub_args(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def _group(self) -> str:
        """The options that this one stands among."""
        return self.option.rpartition(".")[0]

    def check_path(self) -> Path:
        """The path, if it can be a folder or a Hub id.

        Raises:
            InputError: It is neither.
        """
        folder = Path(self.path)
        if not os.path.exists(folder) and (self.path.startswith(("/", ".", "~")) or self.path.count("/") != 1):
            raise InputError(f"`{self.option}`: no folder {self.path!r}. Give a model folder or a Hub id (owner/name).")
        return folder

    def read(self, what: str, loader: Any, **kwargs: Any) -> Any:
        """`loader.from_pretrained`, with an error that names the option."""
        folder = self.check_path()
        if folder.exists() and not (folder / CONFIG).is_file():
            hint = (
                f" Its {ADAPTER} says that it holds adapters alone: merge them into their base model first."
                if (folder / ADAPTER).exists()
                else ""
            )
            raise InputError(
                f"`{self.option}`: {self.path!r} has no config.json; it is no Hugging Face model folder.{hint}"
            )
        try:
            return loader.from_pretrained(self.path, **self._hub_args, **kwargs)
        except Exception as error:  # a damaged file gets through transformers in errors of every kind
            raise self.unreadable(what, error) from error

    def unreadable(self, what: str, error: Exception) -> InputError:
        """The error for what could not be read: names the option, the file at fault, and what was said about it."""
        folder = self._folder()
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        first_line = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        if not isinstance(error, OSError | ValueError | ImportError):
            first_line = f"{type(error).__name__}: {first_line}".removesuffix(": ")
        local = "" if folder is not None else " It is no local folder, and the Hub did not give it."
        file = "" if folder is None else f" Look at its {file_to_blame(folder, what)}:"
        return InputError(f"`{self.option}`: cannot read the {what} of {self.path!r}.{local}{file} {first_line}")

    def unbuildable(self, kind: str, error: Exception) -> InputError:
        """The error for a config of which transformers can make no model of a kind, such as `causal LM`."""
        if "Unrecognized configuration class" in str(error):
            return InputError(
                f"`{self.option}`: transformers has no {kind} of this architecture ({type(self.config).__name__}, "
                f"{self.path!r})."
            )
        return self.unreadable("config", error)

    def _folder(self) -> Path | None:
        """Where its files are: the folder itself, or what is here of the Hub's."""
        if os.path.isdir(self.path):
            return Path(self.path)
        from transformers.utils import cached_file

        quiet = dict.fromkeys(
            f"_raise_exceptions_for_{what}" for what in ("missing_entries", "gated_repo", "connection_errors")
        ) | {"local_files_only": True}
        try:
            found = cached_file(self.path, CONFIG, revision=self.revision, **quiet)
        except OSError:  # no name that a model on the Hub could have
            return None
        return Path(found).parent if found else None

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        if os.path.isdir(self.path):
            self._check_files(Path(self.path))
        config = self.read("config", AutoConfig)
        if not os.path.isdir(self.path) and (folder := self._folder()) is not None:
            self._check_files(folder)
        try:
            config._attn_implementation = None  # which could name code on the Hub; options say what is used
            text = config.get_text_config()
            check_token_ids(vars(text))
            check_sizes(vars(text) | {name: getattr(text, name) for name in MOST if hasattr(text, name)})
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise self.unreadable("config", error) from error
        padding, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if isinstance(padding, int) and isinstance(size, int) and padding >= size:
            raise InputError(
                f"`{self.option}`: the config of {self.path!r} has `pad_token_id` {padding}, but the model has {size} "
                "embeddings, so transformers can't build it. Set it to null, or to a token below, in its config.json."
            )
        return config

    def _check_files(self, folder: Path) -> None:
        """Refuse small files that are damaged, and adapters that transformers would put on the model unasked."""
        if problem := small_file_problem(folder):
            raise InputError(f"`{self.option}`: {problem}. Download or copy that file again, or correct it.")
        if (folder / CONFIG).is_file() and (folder / ADAPTER).exists():
            raise InputError(
                f"`{self.option}`: {folder / ADAPTER} stands beside a model, and transformers would put its adapters "
                "on it. Merge them into the model, or move them to a folder of their own."
            )

    @cached_property
    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        _ = self.config  # by then the file is seen to be whole: transformers takes a damaged one for an absent one
        try:
            found = GenerationConfig.from_pretrained(self.path, revision=self.revision)
            check_token_ids(found.to_dict())
            return found
        except OSError:  # the file is optional
            return GenerationConfig.from_model_config(self.config)
        except Exception as error:  # and a damaged one gets through transformers in errors of every kind
            line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(
                f"`{self.option}`: transformers can't read the generation_config.json of {self.path!r}: {line}. "
                "Correct that file."
            ) from error

    def copy_generation_config(self, folder: str) -> None:
        """Write the generation config into a folder as it came, or what follows from the config if there was none."""
        if not self.copy_files(("generation_config.json",), folder):
            self.generation_config.save_pretrained(folder)

    def copy_files(self, names: Sequence[str], folder: str) -> int:
        """Copy those of the model's files that are there into a folder; returns their number."""
        from transformers.utils import cached_file

        missing_is_fine = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        found = {name: cached_file(self.path, name, revision=self.revision, **missing_is_fine) for name in names}
        there = {name: Path(file) for name, file in found.items() if file is not None}
        for name, file in there.items():
            Path(folder, name).write_bytes(file.read_bytes())
        return len(there)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        _ = self.config  # its errors are clearer, and a Hub that is out of reach is asked for one file only
        tokenizer = self.read("tokenizer", AutoTokenizer)
        try:
            tokenizer("word")
        except Exception as error:  # what a wrong option of its own makes of a call
            raise self.unreadable("tokenizer", error) from error
        if self.chat_template is not None:
            file = Path(self.chat_template)
            if not file.is_file():
                raise InputError(f"`{self._group}.chat_template`: no file {self.chat_template!r}.")
            try:
                tokenizer.chat_template = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"`{self._group}.chat_template`: {self.chat_template!r} is no UTF-8 text: {error}."
                ) from error
        if tokenizer.chat_template is not None:
            try:
                variables_read(tokenizer.chat_template)
            except InputError as error:
                where = self.chat_template or f"{self.path}, chat_template.jinja or tokenizer_config.json"
                raise InputError(f"`{self.option}`: {error} ({where}).") from error
        if tokenizer.chat_template is None:
            raise InputError(
                f"`{self.option}`: the tokenizer of {self.path!r} has no chat template. Choose a chat model, or give a "
                f"Jinja template with `{self._group}.chat_template`."
            )
        return tokenizer

    def check_ids(self, rows: Iterable[tuple[str, Sequence[int]]], option: str) -> None:
        """Refuse rows of token ids that the model has no embeddings of.

        Args:
            rows: (name, token ids) of each.
            option: What gives them, for the error.

        Raises:
            InputError: Names the first such id.
        """
        size = self.config.get_text_config().vocab_size
        for name, row in rows:
            if (most := max(row, default=0)) >= size:
                raise InputError(
                    f"`{option}`: the token {self.tokenizer.decode([most])!r} of {name} has the id {most}, "
                    f"but {self.path!r} has {size} embeddings. Its tokenizer knows tokens that were added without "
                    "resizing the model: take the tokenizer that belongs to it, or a chat template without that token."
                )

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer and has an embedding."""
        config = self.config.get_text_config()
        ids = eos_token_ids(self.tokenizer, config, self.generation_config)
        if ids and not (ids := tuple(i for i in ids if i < config.vocab_size)):
            raise InputError(
                f"`{self.option}`: the EOS token of {self.path!r} has an id beyond the model's {config.vocab_size} "
                "embeddings, so no response could ever end. Take the tokenizer that belongs to the model."
            )
        if not ids:
            raise InputError(f"`{self.option}`: {self.path!r} names no EOS token, so no answer could ever end.")
        return ids

    @property
    def max_context_tokens(self) -> int:
        """Positions the model was built for."""
        text = self.config.get_text_config()
        positions = int(getattr(text, "max_position_embeddings", 0) or -1)
        if positions < 0:  # as XLNet says, which has no limit
            return 2**31
        if "dynamic" in thresholds(self.config):  # whose factors stretch what it was trained for
            positions = int(positions * (getattr(text, "rope_parameters", None) or {}).get("factor", 1.0))
        return positions
