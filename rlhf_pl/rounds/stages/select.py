"""Make pairs of the scored answers."""

from typing import Any

import pyarrow as pa

from rlhf_pl.algorithms.pair_selection import PairSelector
from rlhf_pl.algorithms.reward_shaping import RewardShaping, shape_rewards, without_ties
from rlhf_pl.rounds.stages.generate import TOKENS, prompt_seed
from rlhf_pl.store.round_store import Round

PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen_index", pa.int32()),
        ("rejected_index", pa.int32()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_reward", pa.float64()),
        ("rejected_reward", pa.float64()),
        ("prompt_tokens", TOKENS),
        ("chosen_tokens", TOKENS),
        ("rejected_tokens", TOKENS),
    ]
)


def select(
    stored: Round,
    selector: PairSelector,
    run_seed: int,
    limit: int | None = None,
    shaping: RewardShaping = RewardShaping(),  # noqa: B008 - frozen
    keep_ties: bool = False,
) -> None:
    """Make pairs of the scored answers, at most `limit`, and count the prompts that give none, by reason.

    Args:
        stored: The round; its answers and rewards are read, its pairs written.
        selector: Picks them.
        run_seed: The run's.
        limit: At most so many pairs.
        shaping: What is done to scores first.
        keep_ties: Equal rewards are no reason to drop a pair, for a KL term will break the tie. The selector sees them
            in an order drawn by lot.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    rewards = stored.read("rewards")["reward"].to_pylist()
    for row, reward in zip(stored.read("responses").to_pylist(), rewards, strict=True):
        group = groups.setdefault(row["prompt_id"], [])
        if reward is not None:
            group.append(row | {"reward": reward})
    scores = [[a["reward"] for a in answers] for answers in groups.values()]
    lengths = [[len(a["response_tokens"]) for a in answers] for answers in groups.values()]
    finished = [[a["finished"] for a in answers] for answers in groups.values()]
    shaped, notes = shape_rewards(scores, lengths, finished, shaping)
    dropped = {"no_reward_difference": 0, "same_answer": 0, "not_scored": 0}
    pairs = []
    for i, (prompt_id, answers) in enumerate(groups.items()):
        if len(answers) < 2:
            dropped["not_scored"] += 1
            continue
        for answer, reward in zip(answers, shaped[i], strict=True):
            answer["reward"] = reward
        rewards, seed = shaped[i], prompt_seed(run_seed, "select", prompt_id)
        if keep_ties:
            rewards = without_ties(rewards, [answer["response_tokens"] for answer in answers], seed)
        picked = selector(rewards, lengths[i], finished[i], seed)
        different = [(c, r) for c, r in picked if answers[c]["response_tokens"] != answers[r]["response_tokens"]]
        if not picked:
            dropped["no_reward_difference"] += 1
        elif not different:
            dropped["same_answer"] += 1
        pairs += [_pair_row(answers[c], answers[r]) for c, r in different]
    pairs = pairs[:limit]
    stored.write_shard("pairs", 0, pa.Table.from_pylist(pairs, schema=PAIRS))
    stored.complete(
        "pairs",
        prompts=len(groups),
        pairs=len(pairs),
        dropped=dropped,
        **({"kept_ties": sum(p["chosen_reward"] == p["rejected_reward"] for p in pairs)} if keep_ties else {}),
        selector=type(selector).__name__,
        penalties=notes,
    )


def _pair_row(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    row = {"prompt_id": chosen["prompt_id"], "prompt_tokens": chosen["prompt_tokens"]}
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        row |= {
            name: answer["response"],
            f"{name}_index": answer["response_index"],
            f"{name}_reward": answer["reward"],
            f"{name}_tokens": answer["response_tokens"],
        }
    return row
