"""What is known of a model before its weights load: configs, tokenizer, files."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_pl.chat import eos_token_ids
from rlhf_pl.errors import InputError
from rlhf_pl.rotary import thresholds


@dataclass(frozen=True)
class PolicySource:
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
        if folder.exists() and not (folder / "config.json").is_file():
            raise InputError(f"`{self.option}`: {self.path!r} has no config.json; it is no Hugging Face model folder.")
        try:
            return loader.from_pretrained(self.path, **self._hub_args, **kwargs)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            local = "" if folder.exists() else " It is no local folder, and the Hub did not give it."
            raise InputError(
                f"`{self.option}`: cannot read the {what} of {self.path!r}.{local} {first_line}"
            ) from error

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        config = self.read("config", AutoConfig)
        text = config.get_text_config()
        padding, size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
        if isinstance(padding, int) and isinstance(size, int) and padding >= size:
            raise InputError(
                f"`{self.option}`: the config of {self.path!r} has `pad_token_id` {padding}, but the model has {size} "
                "embeddings, so transformers can't build it. Set it to null, or to a token below, in its config.json."
            )
        return config

    @cached_property
    def generation_config(self) -> Any:
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.path, revision=self.revision)
        except OSError:  # the file is optional
            return GenerationConfig.from_model_config(self.config)
        except (ValueError, TypeError, AttributeError) as error:  # and transformers checks some of its values
            line = str(error).strip().splitlines()[0].rstrip(".")
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
        if self.chat_template is not None:
            file = Path(self.chat_template)
            if not file.is_file():
                raise InputError(f"`{self._group}.chat_template`: no file {self.chat_template!r}.")
            tokenizer.chat_template = file.read_text()
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
        positions = int(getattr(text, "max_position_embeddings", 0) or 2**31)
        if "dynamic" in thresholds(self.config):  # whose factors stretch what it was trained for
            positions = int(positions * (getattr(text, "rope_parameters", None) or {}).get("factor", 1.0))
        return positions
