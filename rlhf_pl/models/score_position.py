"""The token of a conversation at which a reward model's score is read, determined when it is rendered."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_pl.models.pretrained_files import stored_config
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.console import console, warn
from rlhf_pl.utils.errors import InputError

ScoreAt = Literal["last", "eos", "before_eos"]
PLACES = ("last", "eos", "before_eos")
KEY = "score_at"  # in config.json
_warned: set[str] = set()


def resolve_score_at(option: ScoreAt | None, source: ModelSource) -> ScoreAt:
    """Where the score is read: the option's value, or else the model config's, or else the last token.

    Raises:
        InputError: The config has an invalid value.
    """
    found: Any = option or stored_config(source).get(KEY) or "last"
    if found not in PLACES:
        raise InputError(
            f"`{source.option}`: the config of {source.path!r} has `{KEY}` {found!r}; expected one of "
            f"{', '.join(PLACES)}. `score_at` overrides it."
        )
    return found


def write_score_at(config: Any, place: ScoreAt) -> None:
    """Write to a model's config where its score is read, if it is not the last token."""
    if place != "last":
        setattr(config, KEY, place)
    elif hasattr(config, KEY):
        delattr(config, KEY)


def count_trailing_tokens(place: ScoreAt, ending: Sequence[int], eos: Sequence[int], option: str) -> int:
    """Number of tokens of a conversation after the token at which its score is read.

    Args:
        place: Where the score is read.
        ending: Ids of the template's text after the response.
        eos: Ids of EOS tokens.
        option: The option that names the model, for errors.

    Raises:
        InputError: The template writes no EOS after the response.
    """
    if place == "last":
        return 0
    at = next((i for i, token in enumerate(ending) if token in eos), None)
    if at is None:
        raise InputError(
            f"`score_at` is {place}, but the chat template of `{option}` writes no EOS after a response. Set it to "
            "`last`."
        )
    return len(ending) - at - (place == "eos")


def mean_score(config: Any, path: str = "") -> float:
    """The mean score that a model's config gives as `bias`, to subtract from every score; 0 if missing or a boolean.

    Args:
        config: The config, or the content of config.json.
        path: The model's path, for errors.

    Raises:
        InputError: `bias` is not a finite number.
    """
    value = config.get("bias") if isinstance(config, dict) else getattr(config, "bias", None)
    if value is None or isinstance(value, bool):
        return 0.0
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(
            f"`bias` in the config of {path!r} is {value!r}; expected a number, which is subtracted from every score."
        )
    return float(value)


def write_mean_score(config: Any, mean: float) -> None:
    """Write the mean score to a model's config; 0 for none."""
    remove_mean_score(config)
    if mean != 0:
        config.bias = mean


def report_mean_score(mean: float, path: str) -> None:
    """Say, once per process, that a mean score is subtracted."""
    from lightning.pytorch.utilities import rank_zero_only

    text = f"The mean score {mean:.4g} is subtracted from every score of {path}."
    if mean != 0 and text not in _warned and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        _warned.add(text)
        console.print(text, soft_wrap=True)


def remove_mean_score(config: Any) -> None:
    """Remove the mean score from a model's config."""
    if mean_score(config):
        del config.bias


def is_read_before_padding(ending: Sequence[int], source: ModelSource) -> bool:
    """Whether transformers' classifier treats the last token of a conversation as padding, and reads before it."""
    return bool(ending) and ending[-1] == source.config.get_text_config().pad_token_id


def warn_if_read_elsewhere(render: Any, source: ModelSource) -> None:
    """Warn if other tools don't read a model's score at the last token, unless its config has `score_at`.

    Args:
        render: The model's `Renderer`, without `score_at`.
        source: The model's config.
    """
    if is_read_before_padding(render.ending, source) and KEY not in stored_config(source):
        warn_once(
            f"`{source.option}`: conversations for {source.path!r} end with its own padding token. Its score is read "
            "at that last token, as in vLLM; transformers' classifier treats it as padding and reads before it. If "
            "the model was trained that way, set `score_at: before_eos`; `score_at: last` silences this warning."
        )


def warn_once(text: str) -> None:
    """Print a warning once per process."""
    from lightning.pytorch.utilities import rank_zero_only

    if text not in _warned and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        _warned.add(text)
        warn(text)
