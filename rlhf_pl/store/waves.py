"""The waves of a round: the prompts that it samples first, and those that `rollout.refill` adds.

A manifest's entry `refill` has the `start` and the `end` of the round's prompts in the order of the run's prompts; of
each wave its number of `prompts`, the `prompts_per_shard` and, once its responses are scored, the number of `usable`
prompts so far; and `complete`, once no further wave may follow. Rounds without this entry have one wave.
"""

from collections.abc import Mapping
from typing import Any

REFILL = "refill"


def shard_ranges(manifest: Mapping[str, Any], prompts: int) -> list[range]:
    """Indices of the prompts of each shard of a round.

    Args:
        manifest: The round's manifest.
        prompts: Number of prompts of the round.
    """
    one = {"prompts": prompts, "prompts_per_shard": manifest.get("prompts_per_shard", 1)}
    ranges: list[range] = []
    start = 0
    for wave in manifest.get(REFILL, {}).get("waves", [one]):
        end, size = start + wave["prompts"], wave["prompts_per_shard"]
        ranges += [range(first, min(first + size, end)) for first in range(start, end, size)]
        start = end
    return ranges


def count_waves(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The number of `refilled` prompts of a round and the prompts of each of its `waves`; empty without `refill`."""
    if REFILL not in manifest:
        return {}
    waves = [wave["prompts"] for wave in manifest[REFILL]["waves"]]
    return {"refilled": sum(waves[1:]), "waves": waves}
