"""Log-probs that are known without a forward pass: the sampler's, and those that came with another run's round."""

from collections.abc import Collection
from typing import Any, Literal

from rlhf_pl.algorithms.prompt_groups import SAMPLING_LOGPS
from rlhf_pl.data.stored_groups import StoredGroups
from rlhf_pl.rounds.stages.given import PER_TOKEN, SUMS, given_columns
from rlhf_pl.rounds.stages.sampler_logps import SUM, TOKENS, sampler_columns
from rlhf_pl.store.round_store import Round

Origin = Literal["policy", "sampler", "other_run", "old"]
__all__ = ["PER_TOKEN", "Origin", "known_columns", "known_from"]
_NAMES = {"other_run": "given", "sampler": "sampler"}  # in the manifest


def known_columns(
    stored: Round, old: Origin | None, sampling: Origin | None, needs: Collection[str], groups: StoredGroups
) -> dict[str, Any]:
    """Columns of the stage `logps` for the R responses that a round uses, as far as they are known.

    Args:
        stored: The round.
        old: Where the log-probs of pi_old come from: see `LogpsOrigins`.
        sampling: Where those of the policy that sampled the responses come from.
        needs: What the loss needs: of pi_old, those of tokens are read only where `old_token_logps` is named.
        groups: The round's groups.

    Returns:
        `old_logp`, shape (R,), float64, nats; and the lists `old_token_logps` and `sampling_token_logps`, float32.

    Raises:
        InputError: They are missing for some response.
    """
    from_sampler: dict[str, str] = {}
    columns: dict[str, Any] = {}
    if old == "sampler":
        from_sampler = {SUMS: SUM, **({PER_TOKEN: TOKENS} if PER_TOKEN in needs else {})}
    if old == "other_run":
        columns |= given_columns(stored, groups, needs)
    if sampling == "sampler":
        from_sampler[SAMPLING_LOGPS] = TOKENS
    if sampling == "other_run":
        columns[SAMPLING_LOGPS] = given_columns(stored, groups, {PER_TOKEN})[PER_TOKEN]
    return columns | (sampler_columns(stored, groups, from_sampler) if from_sampler else {})


def known_from(old: Origin | None, sampling: Origin | None) -> list[str]:
    """Names in a manifest of what `known_columns` reads."""
    return [name for origin, name in _NAMES.items() if origin in (old, sampling)]
