"""A model before its weights load: configs, tokenizer, files."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_pl.models.chat import eos_token_ids
from rlhf_pl.models.chat_template import find_template_variables
from rlhf_pl.models.config_files import (
    ADAPTER,
    CONFIG,
    CONFIG_LIMITS,
    check_sizes,
    check_token_ids,
    find_faulty_file,
    find_small_file_problem,
)
from rlhf_pl.models.rotary import thresholds
from rlhf_pl.utils.errors import InputError, first_line


@dataclass(frozen=True)
class ModelSource:
    """A model folder or Hub id, with its configs and tokenizer. Loads no weights.

    Args:
        path: A folder in Hugging Face format, or a Hub id.
        revision: Branch, tag or commit of a Hub id.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        trust_remote_code: Run the model's own Python code. Only set it if you trust the authors.
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
    def _option_group(self) -> str:
        """The group of options that `option` belongs to."""
        return self.option.rpartition(".")[0]

    def check_path(self) -> Path:
        """The path as a folder, if it is one or can be a Hub id.

        Raises:
            InputError: It is neither a folder nor a valid Hub id.
        """
        folder = Path(self.path)
        if not os.path.exists(folder) and (self.path.startswith(("/", ".", "~")) or self.path.count("/") != 1):
            raise InputError(f"`{self.option}`: no folder {self.path!r}. Give a model folder or a Hub id (owner/name).")
        return folder

    def read(self, part: str, loader: Any, **kwargs: Any) -> Any:
        """Call `loader.from_pretrained` for a part of the model; errors name the option and the part."""
        folder = self.check_path()
        if folder.exists() and not (folder / CONFIG).is_file():
            hint = (
                f" Its {ADAPTER} means that it holds only adapters: merge them into their base model first."
                if (folder / ADAPTER).exists()
                else ""
            )
            raise InputError(
                f"`{self.option}`: {self.path!r} has no config.json; it is not a Hugging Face model folder.{hint}"
            )
        try:
            return loader.from_pretrained(self.path, **self._hub_args, **kwargs)
        except Exception as error:  # transformers raises any error class for a damaged file
            raise self.read_error(part, error) from error

    def read_error(self, part: str, error: Exception) -> InputError:
        """The error for files that can't be read: names the option, the faulty file and the original error."""
        folder = self._folder()
        lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
        first_line = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
        if not isinstance(error, OSError | ValueError | ImportError):
            first_line = f"{type(error).__name__}: {first_line}".removesuffix(": ")
        local = "" if folder is not None else " It is not a local folder, and the Hub did not return it."
        file = "" if folder is None else f" Check its {find_faulty_file(folder, part)}:"
        return InputError(f"`{self.option}`: cannot read the {part} of {self.path!r}.{local}{file} {first_line}")

    def build_error(self, kind: str, error: Exception) -> InputError:
        """The error for a config from which transformers can't build a model of a kind, for example `causal LM`."""
        if "Unrecognized configuration class" in str(error):
            return InputError(
                f"`{self.option}`: transformers has no {kind} of this architecture ({type(self.config).__name__}, "
                f"{self.path!r})."
            )
        return self.read_error("config", error)

    def _folder(self) -> Path | None:
        """The folder with the model's files: the path itself, or the local cache of the Hub's model."""
        if os.path.isdir(self.path):
            return Path(self.path)
        from transformers.utils import cached_file

        quiet = dict.fromkeys(
            f"_raise_exceptions_for_{case}" for case in ("missing_entries", "gated_repo", "connection_errors")
        ) | {"local_files_only": True}
        try:
            found = cached_file(self.path, CONFIG, revision=self.revision, **quiet)
        except OSError:  # not a valid Hub id
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
            config._attn_implementation = None  # it could name code on the Hub; our options set the attention
            text = config.get_text_config()
            check_token_ids(vars(text))
            check_sizes(vars(text) | {name: getattr(text, name) for name in CONFIG_LIMITS if hasattr(text, name)})
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise self.read_error("config", error) from error
        padding, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if isinstance(padding, int) and isinstance(size, int) and padding >= size:
            raise InputError(
                f"`{self.option}`: the config of {self.path!r} has `pad_token_id` {padding}, but the model has {size} "
                "embeddings, so transformers can't build it. Set it to null, or to a smaller id, in its config.json."
            )
        return config

    def _check_files(self, folder: Path) -> None:
        """Refuse damaged small files, and adapters that transformers would add to the model automatically."""
        if problem := find_small_file_problem(folder):
            raise InputError(f"`{self.option}`: {problem}. Download or copy the file again, or correct it.")
        if (folder / CONFIG).is_file() and (folder / ADAPTER).exists():
            raise InputError(
                f"`{self.option}`: {folder / ADAPTER} is in a model's folder, and transformers would add its adapters "
                "to the model. Merge them into the model, or move them to a separate folder."
            )

    @cached_property
    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        _ = self.config  # checks the file: transformers treats a damaged one as missing
        try:
            found = GenerationConfig.from_pretrained(self.path, revision=self.revision)
            check_token_ids(found.to_dict())
            return found
        except OSError:  # the file is optional
            return GenerationConfig.from_model_config(self.config)
        except Exception as error:  # transformers raises any error class for a damaged file
            line = first_line(error)
            raise InputError(
                f"`{self.option}`: transformers can't read the generation_config.json of {self.path!r}: {line}. "
                "Correct that file."
            ) from error

    def copy_generation_config(self, folder: str) -> None:
        """Copy the generation config to a folder, or write one derived from the config if the model has none."""
        if not self.copy_files(("generation_config.json",), folder):
            self.generation_config.save_pretrained(folder)

    def copy_files(self, names: Sequence[str], folder: str) -> int:
        """Copy the named files of the model, if they exist, to a folder; return the number of copied files."""
        from transformers.utils import cached_file

        missing_is_fine = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        found = {name: cached_file(self.path, name, revision=self.revision, **missing_is_fine) for name in names}
        existing = {name: Path(file) for name, file in found.items() if file is not None}
        for name, file in existing.items():
            Path(folder, name).write_bytes(file.read_bytes())
        return len(existing)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        _ = self.config  # its errors are clearer, and an unreachable Hub gets a request for one file only
        tokenizer = self.read("tokenizer", AutoTokenizer)
        try:
            tokenizer("word")
        except Exception as error:  # a wrong option of the tokenizer only fails in a call
            raise self.read_error("tokenizer", error) from error
        if self.chat_template is not None:
            file = Path(self.chat_template)
            if not file.is_file():
                raise InputError(f"`{self._option_group}.chat_template`: no file {self.chat_template!r}.")
            try:
                tokenizer.chat_template = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"`{self._option_group}.chat_template`: {self.chat_template!r} is not UTF-8 text: {error}."
                ) from error
        if tokenizer.chat_template is not None:
            try:
                find_template_variables(tokenizer.chat_template)
            except InputError as error:
                where = self.chat_template or f"{self.path}, chat_template.jinja or tokenizer_config.json"
                raise InputError(f"`{self.option}`: {error} ({where}).") from error
        if tokenizer.chat_template is None:
            raise InputError(
                f"`{self.option}`: the tokenizer of {self.path!r} has no chat template. Choose a chat model, or set "
                f"`{self._option_group}.chat_template` to a Jinja file."
            )
        return tokenizer

    def check_ids(self, rows: Iterable[tuple[str, Sequence[int]]], option: str) -> None:
        """Refuse rows with token ids for which the model has no embeddings.

        Args:
            rows: (name, token ids) of each row.
            option: The option that the rows come from, for the error.

        Raises:
            InputError: Names the first such id.
        """
        size = self.config.get_text_config().vocab_size
        for name, row in rows:
            if (most := max(row, default=0)) >= size:
                raise InputError(
                    f"`{option}`: the token {self.tokenizer.decode([most])!r} of {name} has the id {most}, "
                    f"but {self.path!r} has {size} embeddings. Tokens were added to its tokenizer without resizing the "
                    "model: use the tokenizer that belongs to it, or a chat template without that token."
                )

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every EOS token id that has an embedding."""
        config = self.config.get_text_config()
        ids = eos_token_ids(self.tokenizer, config, self.generation_config)
        if ids and not (ids := tuple(i for i in ids if i < config.vocab_size)):
            raise InputError(
                f"`{self.option}`: the EOS token of {self.path!r} has an id beyond the model's {config.vocab_size} "
                "embeddings, so no response could ever finish. Use the tokenizer that belongs to the model."
            )
        if not ids:
            raise InputError(f"`{self.option}`: {self.path!r} has no EOS token, so no response could ever finish.")
        return ids

    @property
    def max_context_tokens(self) -> int:
        """Positions the model was built for."""
        text = self.config.get_text_config()
        positions = int(getattr(text, "max_position_embeddings", 0) or -1)
        if positions < 0:  # XLNet has no limit and gives -1
            return 2**31
        if "dynamic" in thresholds(self.config):  # these factors extend the training length
            positions = int(positions * (getattr(text, "rope_parameters", None) or {}).get("factor", 1.0))
        return positions
