"""The pairs of a stored round, joined with its other stages."""

from typing import Any

from rlhf_pl.store.round_store import Round


def read_pairs(stored: Round) -> list[dict[str, Any]]:
    """Read the pairs with the tokens and, if stored, the log-probs of their two responses (`chosen_tokens`, ...)."""
    by_key: dict[tuple[str, int], dict[str, Any]] = {}
    for stage in ("responses", "logps") if stored.is_complete("logps") else ("responses",):
        for row in stored.read(stage).to_pylist():
            by_key.setdefault((row["prompt_id"], row["response_index"]), {}).update(row)
    rows = stored.read("pairs").to_pylist()
    for row in rows:
        for which in ("chosen", "rejected"):
            response = by_key[row["prompt_id"], row[f"{which}_index"]]
            row |= {"prompt_tokens": response["prompt_tokens"], f"{which}_tokens": response["response_tokens"]}
            row |= {f"{which}_{name}": value for name, value in response.items() if name.endswith("_logp")}
    return rows
