"""Choose what a round trains on: pairs of the scored responses, or all of them."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.algorithms.pair_selection import PairSelector
from rlhf_pl.algorithms.reward_shaping import RewardShaping, break_ties, shape_rewards
from rlhf_pl.data.stored_groups import GROUPS, PAIRS
from rlhf_pl.rounds.stages.generate import prompt_seed
from rlhf_pl.store.round_store import Round

_COLUMNS = ("prompt_id", "response_index", "finished", "response_tokens")


@dataclass
class _Group:
    """The scored responses of a prompt; `same` tells those of equal tokens apart from others."""

    prompt_id: str
    indices: list[int]
    rewards: list[float]
    lengths: list[int]
    finished: list[bool]
    same: list[bytes]


def select(
    stored: Round,
    selector: PairSelector | None,
    run_seed: int,
    limit: int | None = None,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 - frozen
    keep_ties: bool = False,
) -> None:
    """Choose what is trained on, at most `limit` pairs or groups, and count the prompts that give none, by reason.

    Args:
        stored: The round; its responses and rewards are read, its stage `pairs` written: indices into each prompt's
            responses, and shaped rewards.
        selector: Picks pairs; None for whole groups, of the prompts with two scored responses or more.
        run_seed: The run's.
        limit: At most so many pairs or groups.
        shaping: What is done to scores first.
        keep_ties: Equal rewards are no reason to drop a pair, for a KL term will break the tie. The selector sees them
            in a random order.
    """
    groups = _scored_groups(stored)
    every = [[getattr(group, name) for group in groups] for name in ("rewards", "lengths", "finished")]
    shaped, notes = shape_rewards(every[0], every[1], every[2], shaping)
    for group, rewards in zip(groups, shaped, strict=True):
        group.rewards = rewards
    usable = [group for group in groups if len(group.indices) > 1]
    dropped = {"no_reward_difference": 0, "same_answer": 0, "not_scored": len(groups) - len(usable)}
    if selector is None:
        usable = usable[:limit]
        table = _of_groups(usable)
        counts = {"pairs": len(usable), "groups": len(usable), "responses": len(table)}
    else:
        table = _of_pairs(usable, selector, run_seed, keep_ties, dropped).slice(0, limit)
        counts = {"pairs": len(table)}
        if keep_ties:
            counts["kept_ties"] = pc.sum(pc.equal(table["chosen_reward"], table["rejected_reward"])).as_py() or 0
    stored.write_shard("pairs", 0, table)
    stored.complete(
        "pairs",
        prompts=len(groups),
        **counts,
        dropped=dropped,
        selector=None if selector is None else type(selector).__name__,
        penalties=notes,
    )


def _of_groups(groups: Sequence[_Group]) -> pa.Table:
    """A row for each of their responses."""
    ids = [group.prompt_id for group in groups for _ in group.indices]
    indices = [index for group in groups for index in group.indices]
    rewards = [reward for group in groups for reward in group.rewards]
    return pa.Table.from_arrays([pa.array(c, t) for c, t in zip((ids, indices, rewards), GROUPS.types, strict=True)],
                                schema=GROUPS)  # fmt: skip


def _of_pairs(
    groups: Sequence[_Group], selector: PairSelector, run_seed: int, keep_ties: bool, dropped: dict[str, int]
) -> pa.Table:
    """A row for each pair; prompts without one are counted in `dropped`."""
    rows = []
    for group in groups:
        rewards, seed = group.rewards, prompt_seed(run_seed, "select", group.prompt_id)
        if keep_ties:
            rewards = break_ties(rewards, group.same, seed)
        picked = selector(rewards, group.lengths, group.finished, seed)
        different = [(c, r) for c, r in picked if group.same[c] != group.same[r]]
        if not picked:
            dropped["no_reward_difference"] += 1
        elif not different:
            dropped["same_answer"] += 1
        for c, r in different:
            of_pair = (group.indices[c], group.indices[r], group.rewards[c], group.rewards[r])
            rows.append((group.prompt_id, *of_pair))
    columns = list(zip(*rows, strict=True)) or [()] * len(PAIRS)
    return pa.Table.from_arrays([pa.array(c, t) for c, t in zip(columns, PAIRS.types, strict=True)], schema=PAIRS)


def _scored_groups(stored: Round) -> list[_Group]:
    """The prompts in the order of their first responses, each with those that have a reward."""
    rewards = stored.read("rewards", ["reward"])["reward"].to_pylist()
    groups: dict[str, _Group] = {}
    place = 0
    for table in stored.read_shards("responses", _COLUMNS):
        tokens = table["response_tokens"].combine_chunks()
        columns = [table[name].to_pylist() for name in _COLUMNS[:3]]
        lengths = tokens.value_lengths().to_pylist()
        rows = zip(*columns, lengths, _digests(tokens), rewards[place : place + len(table)], strict=True)
        for prompt_id, index, finished, length, digest, reward in rows:
            group = groups.setdefault(prompt_id, _Group(prompt_id, [], [], [], [], []))
            if reward is not None:
                group.indices.append(index)
                group.rewards.append(reward)
                group.lengths.append(length)
                group.finished.append(finished)
                group.same.append(digest)
        place += len(table)
    if place != len(rewards):
        raise ValueError(f"{place} responses, but {len(rewards)} rewards.")
    return list(groups.values())


def _digests(tokens: pa.ListArray) -> Iterator[bytes]:
    """A hash of each response's tokens."""
    values: np.ndarray = np.ascontiguousarray(tokens.values.to_numpy())
    ends = tokens.offsets.to_numpy()
    for start, end in itertools.pairwise(ends):
        yield hashlib.blake2b(values[start:end].data, digest_size=16).digest()
