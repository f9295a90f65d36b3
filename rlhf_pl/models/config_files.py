"""The small files of a model folder: checks, and the file that caused a library's error.

transformers treats some damaged files as missing, and raises any error class for others.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG = "config.json"
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = "tokenizer.json"
# largest accepted values; more layers would take minutes to build even without weights
CONFIG_LIMITS = {
    "num_hidden_layers": 1024,
    **dict.fromkeys(("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads"), 2**17),
    "vocab_size": 2**31,
    "max_position_embeddings": 2**31,
}
_JSON_FILES = (
    CONFIG,
    GENERATION,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


def find_small_file_problem(folder: Path) -> str | None:
    """Describe the first damaged small file of a folder; return None if all that exist are valid."""
    for name in (*_JSON_FILES, _TEMPLATE, TOKENIZER, *WEIGHTS, *_TOKENIZER_FILES):
        file = folder / name
        if (file.exists() or file.is_symlink()) and not file.is_file():
            return f"{file} is {'a folder' if file.is_dir() else 'a link to nothing'}; it must be a file"
    for name in _JSON_FILES:
        if (folder / name).is_file() and (problem := _find_json_problem(folder / name)):
            return f"{folder / name} {problem}"
    if (folder / _TEMPLATE).is_file():
        try:
            (folder / _TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return f"{folder / _TEMPLATE} is not UTF-8 text: {error}"
    return None


def _find_json_problem(file: Path) -> str | None:
    """Describe why a file is not a JSON object with valid numbers; return None if it is one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"is not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"
    if not isinstance(content, dict):
        return f"holds a JSON {type(content).__name__}; it must be an object"
    wrong = next(_find_invalid_numbers(content), None)
    return None if wrong is None else f"has `{wrong[0]}` {wrong[1]}, which is not a number"


def _find_invalid_numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """NaN anywhere, and infinity outside lists: in lists it is a valid limit, for example Mamba's."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, float) and math.isinf(inner):
                yield key, inner
            yield from _find_invalid_numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _find_invalid_numbers(inner, name)
    elif isinstance(value, float) and math.isnan(value):
        yield name, value


def has_weights(folder: Path) -> bool:
    """Whether this folder has a model's weight files, valid or not."""
    return any((folder / name).exists() for name in WEIGHTS)


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a config value that no model has, before building the model takes all memory."""
    for name, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        unlimited = name == "max_position_embeddings" and value == -1
        if name in CONFIG_LIMITS and not unlimited and not 0 < value <= CONFIG_LIMITS[name]:
            raise ValueError(f"`{name}` is {value}; it must be 1 or more, and at most {CONFIG_LIMITS[name]}.")
        if name.split("_")[-1] in ("eps", "epsilon") and not 0 <= value <= 0.1:
            raise ValueError(f"`{name}` is {value}; it must be small, and not negative.")


def check_token_ids(config: Mapping[str, Any]) -> None:
    """Raise ValueError for an invalid token id."""
    for name, value in config.items():
        if name in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None:
            ids = value if isinstance(value, list) else [value]
            least = 0 if name == "eos_token_id" else -1  # -1 means none in some configs
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= least for i in ids):
                raise ValueError(f"`{name}` is {value!r}; it must be a token id, or a list of token ids")


def find_faulty_file(folder: Path, part: str) -> str:
    """The file of a folder that made a library fail to read its config, tokenizer or weights."""
    if part == "weights":
        return " and ".join([CONFIG, *(name for name in WEIGHTS if (folder / name).exists())])
    if part != "tokenizer":
        return CONFIG
    from tokenizers import Tokenizer

    if (folder / TOKENIZER).is_file():
        try:
            Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception:  # tokenizers raises plain `Exception`
            return TOKENIZER
        return "tokenizer_config.json"
    return next((name for name in _TOKENIZER_FILES if (folder / name).exists()), TOKENIZER)
