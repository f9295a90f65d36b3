"""Where in a conversation a reward model's score is read: found by length when the conversation is rendered."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_pl.models.pretrained_files import stored_config
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.console import warn
from rlhf_pl.utils.errors import InputError

ScoreAt = Literal["last", "eos", "before_eos"]
PLACES = ("last", "eos", "before_eos")
KEY = "score_at"  # of a config.json
_warned: set[str] = set()


def score_place(wanted: ScoreAt | None, source: ModelSource) -> ScoreAt:
    """Where the score is read: where it was asked for, else where the model's config says, else at the last token.

    Raises:
        InputError: The config names no such place.
    """
    found: Any = wanted or stored_config(source).get(KEY) or "last"
    if found not in PLACES:
        raise InputError(
            f"`{source.option}`: the config of {source.path!r} has `{KEY}` {found!r}; expected one of "
            f"{', '.join(PLACES)}. `score_at` overrides it."
        )
    return found


def note_place(config: Any, place: ScoreAt) -> None:
    """Write into a model's config where its score is read, if that is not the last token."""
    if place != "last":
        setattr(config, KEY, place)
    elif hasattr(config, KEY):
        delattr(config, KEY)


def tokens_left_off(place: ScoreAt, ending: Sequence[int], eos: Sequence[int], option: str) -> int:
    """How many tokens of a conversation lie behind the place where its score is read.

    Args:
        place: Where that is.
        ending: What the template writes after the response.
        eos: Ids that end a response.
        option: The option that names the model, for errors.

    Raises:
        InputError: The template ends the response with no EOS.
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
    """What `bias` in a model's config says is to be subtracted from every score; 0 if it is not there or is a switch.

    Args:
        config: The config, or what config.json holds.
        path: Of the model, for errors.

    Raises:
        InputError: It is no finite number.
    """
    value = config.get("bias") if isinstance(config, dict) else getattr(config, "bias", None)
    if value is None or isinstance(value, bool):
        return 0.0
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(
            f"`bias` in the config of {path!r} is {value!r}; expected a number, which is subtracted from every score."
        )
    return float(value)


def forget_mean(config: Any) -> None:
    """Take a mean score out of a model's config."""
    if mean_score(config):
        del config.bias


def reads_elsewhere(ending: Sequence[int], source: ModelSource) -> bool:
    """Whether transformers' classifier takes the last token of a conversation for padding, and reads before it."""
    return bool(ending) and ending[-1] == source.config.get_text_config().pad_token_id


def warn_of_other_reading(render: Any, source: ModelSource) -> None:
    """Say where other tools read a model's score at another place than the last token, unless its config says where.

    Args:
        render: The model's `Renderer`, with no place asked for.
        source: Its config.
    """
    if reads_elsewhere(render.ending, source) and KEY not in stored_config(source):
        warn_once(
            f"`{source.option}`: conversations for {source.path!r} end with its own padding token. Its score is read "
            "at that last token, as vLLM does; transformers' classifier takes it for padding and reads before it. If "
            "the model was trained that way, set `score_at: before_eos`; `score_at: last` ends this warning."
        )


def warn_once(text: str) -> None:
    """Print a warning, the first time only."""
    from lightning.pytorch.utilities import rank_zero_only

    if text not in _warned and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        _warned.add(text)
        warn(text)
