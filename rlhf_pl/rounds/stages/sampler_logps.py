"""Log-probs that the sampler reported with its responses."""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.data.stored_groups import KEY, StoredGroups
from rlhf_pl.rollout.base import LOGP_TEMPERATURE, Response
from rlhf_pl.rounds.stages.given import response_keys
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError

SUM, TOKENS = "sampler_logp", "sampler_token_logps"  # columns of the stage `responses`
# describes both in files and manifest: log softmax(logits) of a response's tokens, and their sum
DESCRIPTION = {"temperature": LOGP_TEMPERATURE, "truncation": "none", "unit": "nats"}
_METADATA = {name: str(value) for name, value in DESCRIPTION.items()}
SUM_FIELD = pa.field(SUM, pa.float64(), metadata=_METADATA)
TOKENS_FIELD = pa.field(TOKENS, pa.list_(pa.float32()), metadata=_METADATA)


def has_token_logps(stored: Round) -> bool:
    """Whether a round's responses, which are complete, came with the sampler's log-prob of every token."""
    return TOKENS in stored.info("responses")


def token_logps(response: Response) -> list[float]:
    """The log-prob of every token of a response.

    Raises:
        InputError: The sampler has not reported all of them, or some are not finite.
    """
    if len(response.logps) != len(response.token_ids):
        raise InputError(
            f"`rollout.sampler`: it returned {len(response.logps)} log-probs for {len(response.token_ids)} tokens, but "
            "`model.loss` needs that of every token. It must return them where `PromptTokens.logps` is true."
        )
    if not all(map(math.isfinite, response.logps)):
        raise InputError(
            "`rollout.sampler`: it returned log-probs that are not finite. Leave `model.loss.correction` out, or set "
            "`rollout.old_logps` to policy, to train without them."
        )
    return response.logps


def sampler_columns(stored: Round, groups: StoredGroups, names: Mapping[str, str]) -> dict[str, Any]:
    """What the sampler reported of the R responses that a round uses.

    Args:
        stored: The round.
        groups: Its groups.
        names: For each column to return, the column of the stage `responses` that it comes from: `SUM`, which gives
            float64, shape (R,), or `TOKENS`, which gives lists of float32; nats.

    Raises:
        InputError: The responses were sampled without.
    """
    wanted = response_keys(groups.prompt_ids, pa.array(groups.indices))
    columns = sorted(set(names.values()))
    keys, parts = [], []
    if TOKENS in columns and not has_token_logps(stored):
        raise InputError(_describe_missing(stored, columns))
    for table in stored.read_shards("responses", [*KEY, *columns]):
        if any(table[name].null_count for name in columns):
            raise InputError(_describe_missing(stored, columns))
        own = response_keys(table[KEY[0]], table[KEY[1]])
        is_used = pc.is_in(own, value_set=wanted)
        keys.append(own.filter(is_used))
        parts.append(table.select(columns).filter(is_used))
    rows = pc.index_in(wanted, value_set=pa.concat_arrays(keys))
    found = pa.concat_tables(parts)
    return {name: found[column].combine_chunks().take(rows) for name, column in names.items()}


def _describe_missing(stored: Round, columns: list[str]) -> str:
    if TOKENS in columns:
        return (
            f"The responses of {stored.path} were sampled without the log-prob of every token, which `model.loss` "
            "needs of the sampler (`model.loss.correction`, or `rollout.old_logps` is sampler). Leave the option out "
            "for this round, or move the round's folder away to sample its responses again."
        )
    return (
        f"`rollout.old_logps` is sampler, but the responses of {stored.path} were sampled without log-probs. Set it to "
        "policy for this round, or move the round's folder away to sample its responses again."
    )
