"""The small files of a model folder: whether they are whole, and which one a library stumbled over.

transformers takes some damaged files for absent ones, and others for errors of every kind.
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
# what configs say at most; more layers would take minutes to build even without weights
MOST = {
    "num_hidden_layers": 1024,
    **dict.fromkeys(("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads"), 2**17),
    "vocab_size": 2**31,
    "max_position_embeddings": 2**31,
}
_OBJECTS = (
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
_OF_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")


def small_file_problem(folder: Path) -> str | None:
    """What is wrong with one of a folder's small files, with its name; None if all that are there are whole."""
    for name in (*_OBJECTS, _TEMPLATE, TOKENIZER, *WEIGHTS, *_OF_TOKENIZERS):
        file = folder / name
        if (file.exists() or file.is_symlink()) and not file.is_file():
            return f"{file} is {'a folder' if file.is_dir() else 'a link to nothing'}; it must be a file"
    for name in _OBJECTS:
        if (folder / name).is_file() and (problem := _object_problem(folder / name)):
            return f"{folder / name} {problem}"
    if (folder / _TEMPLATE).is_file():
        try:
            (folder / _TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            return f"{folder / _TEMPLATE} is no UTF-8 text: {error}"
    return None


def _object_problem(file: Path) -> str | None:
    """What keeps a file from being a JSON object with usable numbers."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"is no JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"
    if not isinstance(content, dict):
        return f"holds a JSON {type(content).__name__}; it must be an object"
    wrong = next(_broken_numbers(content), None)
    return None if wrong is None else f"says that `{wrong[0]}` is {wrong[1]}, which is no number"


def _broken_numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """NaN anywhere, and infinity but in lists: limits such as Mamba's are written so."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, float) and math.isinf(inner):
                yield key, inner
            yield from _broken_numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _broken_numbers(inner, name)
    elif isinstance(value, float) and math.isnan(value):
        yield name, value


def has_weights(folder: Path) -> bool:
    """Whether a model's weights are in this folder, whole or not."""
    return any((folder / name).exists() for name in WEIGHTS)


def check_sizes(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a number of a config that no model has, which could also take all memory to find out."""
    for name, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        unlimited = name == "max_position_embeddings" and value == -1
        if name in MOST and not unlimited and not 0 < value <= MOST[name]:
            raise ValueError(f"`{name}` is {value}; it must be 1 or more, and at most {MOST[name]}.")
        if name.split("_")[-1] in ("eps", "epsilon") and not 0 <= value <= 0.1:
            raise ValueError(f"`{name}` is {value}; it must be small, and not negative.")


def check_token_ids(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a token id that is none."""
    for name, value in config.items():
        if name in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None:
            ids = value if isinstance(value, list) else [value]
            least = 0 if name == "eos_token_id" else -1  # which stands for none in some
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= least for i in ids):
                raise ValueError(f"`{name}` is {value!r}; it must be a token's number, or a list of such")


def file_to_blame(folder: Path, what: str) -> str:
    """The file of a folder that a library has stumbled over when it read its config, tokenizer or weights."""
    if what == "weights":
        return " and ".join([CONFIG, *(name for name in WEIGHTS if (folder / name).exists())])
    if what != "tokenizer":
        return CONFIG
    from tokenizers import Tokenizer

    if (folder / TOKENIZER).is_file():
        try:
            Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception:  # all that it raises, which is of no class of its own
            return TOKENIZER
        return "tokenizer_config.json"
    return next((name for name in _OF_TOKENIZERS if (folder / name).exists()), TOKENIZER)
