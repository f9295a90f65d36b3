"""Log-probs under pi_old that come with a round of another run."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.data.stored_groups import KEY, StoredGroups
from rlhf_pl.store.round_store import GIVEN, Round
from rlhf_pl.store.source_run import SourceRound
from rlhf_pl.utils.errors import InputError

SUMS, PER_TOKEN = "old_logp", "old_token_logps"


def read_given(source: SourceRound) -> pa.Table | None:
    """Read the log-probs under pi_old that a round of another run has stored; None if it has none.

    Returns:
        A row per response: `prompt_id`, `response_index`, `old_logp` (nats) and, where the run has stored them,
        `old_token_logps`, a list of float32.
    """
    tables = [source.read(GIVEN) if source.is_complete(GIVEN) else None, _read_own(source)]
    # per token where there are such values, else of as many responses as possible
    return max((t for t in tables if t is not None), key=lambda t: (t.num_columns, len(t)), default=None)


def _read_own(source: SourceRound) -> pa.Table | None:
    """The log-probs of the stage `logps`."""
    if not source.is_complete("logps"):
        return None
    if source.manifest.get("rounds_from", {}).get("off_policy") and "old" in source.info("logps").get("policies", ()):
        return None  # with a correction pi_old is that run's own policy, which has not sampled the round
    table = source.read("logps")
    if KEY[1] not in table.column_names:
        return _from_pairs(source.read("pairs"), table)
    if SUMS not in table.column_names:
        return None
    return table.select([*KEY, SUMS, *([PER_TOKEN] if PER_TOKEN in table.column_names else [])])


def _from_pairs(pairs: pa.Table, logps: pa.Table) -> pa.Table | None:
    """The same from a round of an earlier version, with a row per pair."""
    which = ("chosen", "rejected")
    if f"chosen_{SUMS}" not in logps.column_names or "chosen_index" not in pairs.column_names:
        return None
    parts = [
        pa.table(
            {
                KEY[0]: pairs[KEY[0]],
                KEY[1]: pairs[f"{name}_index"].cast(pa.int32()),
                SUMS: logps[f"{name}_{SUMS}"].cast(pa.float64()),
            }
        )
        for name in which
    ]
    table = pa.concat_tables(parts)
    firsts = np.sort(np.unique(response_keys(table[KEY[0]], table[KEY[1]]).to_numpy(zero_copy_only=False), True)[1])
    return table.take(pa.array(firsts))


def given_columns(stored: Round, groups: StoredGroups, needs: Collection[str]) -> dict[str, Any]:
    """Columns of the stage `logps` for the responses that a round uses, from the log-probs that came with it.

    Args:
        stored: The round.
        groups: Its groups, of R responses.
        needs: What the loss needs: `old_token_logps` are read only where it is named.

    Returns:
        `old_logp`, shape (R,), float64, nats; and the lists `old_token_logps`.

    Raises:
        InputError: They are missing for some response.
    """
    table = stored.read(GIVEN) if stored.is_complete(GIVEN) else None
    if missing := find_missing(table, groups.prompt_ids, groups.indices, needs):
        raise InputError(
            f"Another policy has sampled {stored.path}, and of log-probs under it there are {missing}. Use the "
            "selector and the shaping of that policy's run."
        )
    assert table is not None
    keys = response_keys(table[KEY[0]], table[KEY[1]])
    rows = pc.index_in(response_keys(groups.prompt_ids, pa.array(groups.indices)), value_set=keys)
    names = [SUMS, *([PER_TOKEN] if PER_TOKEN in needs else [])]
    return {name: table[name].combine_chunks().take(rows) for name in names}


def find_missing(given: pa.Table | None, prompt_ids: Any, indices: Any, needs: Collection[str]) -> str:
    """What there is of the log-probs under pi_old of some responses, such as `none`; an empty text if nothing lacks.

    Args:
        given: What is stored, as `read_given` returns it.
        prompt_ids: Prompt id of each response that is used.
        indices: Its index among those of its prompt.
        needs: What the loss needs.
    """
    if given is None:
        return "none"
    if PER_TOKEN in needs and PER_TOKEN not in given.column_names:
        return "sums over responses, but none of each token"
    keys = response_keys(given[KEY[0]], given[KEY[1]])
    found = pc.is_in(pc.unique(response_keys(prompt_ids, pa.array(indices))), value_set=keys)
    lacking = len(found) - pc.sum(found).as_py() if len(found) else 0
    return f"none for {lacking} of the {len(found)} responses that are used" if lacking else ""


def response_keys(prompt_ids: Any, indices: Any) -> pa.Array:
    """A text for each (prompt, index of the response)."""
    keys = pc.binary_join_element_wise(pc.cast(indices, pa.string()), prompt_ids, " ")
    return keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
