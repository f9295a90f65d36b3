"""Responses under the prompts of other groups, whose mean log-ratio is KTO's estimate of the KL divergence."""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from rlhf_pl.data.stored_groups import StoredGroups


def mismatch_prompts(groups: StoredGroups) -> StoredGroups | None:
    """The groups with the responses of each prompt under the next prompt with other tokens, the last under the first.

    The order is that of the first group of each prompt, so it does not depend on what trains together.

    Returns:
        The same groups with other prompts; None if they have fewer than two different prompts.
    """
    tokens = [groups.prompt_tokens[int(groups.rows(g)[0])].values.to_numpy().tobytes() for g in range(len(groups))]
    firsts: dict[bytes, int] = {}  # row of a response to each prompt
    for group, prompt in enumerate(tokens):
        firsts.setdefault(prompt, int(groups.rows(group)[0]))
    if len(firsts) < 2:
        return None
    prompts = list(firsts)
    following = dict(zip(prompts, [*prompts[1:], prompts[0]], strict=True))
    rows = np.zeros(len(groups.indices), np.int64)
    for group, prompt in enumerate(tokens):
        rows[groups.rows(group)] = firsts[following[prompt]]
    return replace(groups, prompt_tokens=groups.prompt_tokens.take(pa.array(rows)), pairs=None)
