"""The scored responses that a round does not train on."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.data.stored_groups import KEY, StoredGroups, run_lengths
from rlhf_pl.rounds.stages.given import response_keys
from rlhf_pl.store.round_store import Round


def read_unused(stored: Round, groups: StoredGroups) -> StoredGroups:
    """Read the scored responses of a round that are not among its groups, grouped by prompt.

    Args:
        stored: The round.
        groups: What it trains on.

    Returns:
        Their prompts and tokens; rewards are 0.
    """
    rewards = stored.read("rewards", [*KEY, "reward"])
    scored = rewards.filter(rewards["reward"].is_valid())
    used = response_keys(groups.prompt_ids, pa.array(groups.indices))
    keys = response_keys(scored[KEY[0]], scored[KEY[1]])
    unused = keys.filter(pc.invert(pc.is_in(keys, value_set=used)))
    columns = [*KEY, "finished", "prompt_tokens", "response_tokens"]
    parts = []
    for table in stored.read_shards("responses", columns):
        parts.append(table.filter(pc.is_in(response_keys(table[KEY[0]], table[KEY[1]]), value_set=unused)))
    found = pa.concat_tables(parts).combine_chunks()
    prompt_ids, indices, finished, prompts, responses = (found[name].combine_chunks() for name in columns)
    return StoredGroups(
        prompt_ids,
        indices.to_numpy(),
        prompts,
        responses,
        finished.to_numpy(zero_copy_only=False),
        np.zeros(len(found)),
        run_lengths(prompt_ids),
        np.arange(len(found)),
        None,
    )
