"""Scores the responses of a round, shard by shard; results of interrupted shards are kept."""

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.data.prompts import Prompt
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.rewards.base import Failure, Reward, RewardResult, Sample
from rlhf_pl.rewards.guard import Outcome, ScoringConfig, score_samples
from rlhf_pl.rewards.remove_thinking import remove_thinking
from rlhf_pl.rounds.stages.generate import Report
from rlhf_pl.store.journal import Entry, Journal
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redact

_COLUMNS = ("prompt_id", "response_index", "response", "finished", "prompt_tokens", "response_tokens")
_PROMPT_TAIL = 32  # tokens at a prompt's end, where a template opens the thinking


class ShardScorer:
    """Scores the responses of a shard.

    A journal beside the shards keeps the results of each call until the shard is written, so that nothing is scored
    twice.

    Args:
        stored: The round.
        prompts: Its prompts.
        reward: The reward.
        config: How the reward is called.
        tokenizer: The policy's tokenizer; needed where thinking is withheld from the reward.
    """

    def __init__(
        self, stored: Round, prompts: Sequence[Prompt], reward: Reward, config: ScoringConfig, tokenizer: Any = None
    ) -> None:
        self.stored, self.reward, self.config, self.tokenizer = stored, reward, config, tokenizer
        self._by_id = {p.prompt_id: p for p in prompts}

    def __call__(
        self,
        number: int,
        report: Report = lambda count, note: None,
        should_continue: Callable[[], bool] = lambda: True,
    ) -> None:
        """Score and write a shard.

        Args:
            number: The shard's number.
            report: Receives (responses done, note).
            should_continue: Called before every call of the reward; if it returns False, the shard stays unfinished.
        """
        table = self.stored.read_shard("responses", number, _COLUMNS)
        header = [self.stored.shards("responses", number)[number].name, redact(self.reward.fingerprint())]
        header += [json.dumps(self.config.withheld)] if self.config.withheld else []
        journal = Journal(self.stored.path / "rewards" / f"_{number:05d}.journal", header)
        outcomes = [_outcome(entry) for entry in journal.read()]
        report(len(outcomes), "")

        def keep(new: list[Outcome]) -> None:
            journal.add([_entry(outcome) for outcome in new])
            report(len(new), "")

        for end in _call_ends(table["prompt_id"], self.config.prompts_per_call):
            if end <= len(outcomes):
                continue
            if not should_continue():
                return
            batch = self._samples(table.slice(len(outcomes), end - len(outcomes)))
            try:
                outcomes += score_samples(self.reward, batch, self.config, keep)
            except InputError as error:
                raise InputError(f"{error} Results so far are kept.") from error
        self.stored.write_shard("rewards", number, _reward_table(table, outcomes, self.config))

    def _samples(self, rows: pa.Table) -> list[Sample]:
        """The responses of one call; only their tokens become Python lists."""
        samples = [
            Sample(
                row["prompt_id"],
                self._by_id[row["prompt_id"]].messages,
                row["response"],
                row["response_tokens"],
                row["finished"],
                self._by_id[row["prompt_id"]].columns,
                tools=self._by_id[row["prompt_id"]].tools,
                chat_template_kwargs=self._by_id[row["prompt_id"]].chat_template_kwargs,
            )
            for row in rows.drop_columns(["response_index", "prompt_tokens"]).to_pylist()
        ]
        if not self.config.strip_thinking:
            return samples
        prompts = [self.tokenizer.decode(ids.values[-_PROMPT_TAIL:].to_pylist()) for ids in rows["prompt_tokens"]]
        return [
            remove_thinking(sample, self.config.thinking_marks, prompt, self.tokenizer)
            for sample, prompt in zip(samples, prompts, strict=True)
        ]


def score(
    stored: Round,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
    report: Report = lambda count, note: None,
    ranks: Ranks = Ranks(),  # noqa: B008 - one process
    tokenizer: Any = None,
) -> None:
    """Score every response of a round; the shards are divided among the ranks.

    Args:
        stored: The round.
        prompts: Its prompts.
        reward: The reward.
        config: How the reward is called.
        report: Receives (responses done, note).
        ranks: The run's ranks; all of them call this function.
        tokenizer: The policy's tokenizer; needed where thinking is withheld from the reward.

    Raises:
        InputError: The reward failed for a response and `on_failure` is `error`, or it failed for all responses.
    """
    scorer = ShardScorer(stored, prompts, reward, config, tokenizer)
    started = time.monotonic()
    done = ranks.broadcast(set(stored.shards("rewards")))
    shards = ranks.broadcast(set(stored.shards("responses")))
    stored.await_shards("responses", len(shards))
    todo = [n for n in shards if n not in done] + [n for n in shards if n in done]
    remaining = stored.info("responses")["responses"]

    def report_own(count: int, note: str) -> None:
        nonlocal remaining
        remaining -= count
        report(count, note)

    for number in sorted(todo[ranks.rank :: ranks.size]):
        if number in done and _apply_failure_policy(stored, number, config):
            report_own(len(stored.read_shard("rewards", number, ["prompt_id"])), "")
        else:
            scorer(number, report_own)
    ranks.barrier()
    seconds = time.monotonic() - started
    if remaining:  # which other ranks have scored
        report(remaining, "")
    ranks.run_on_rank_zero(lambda: _complete(stored, len(shards), reward, config, seconds))


def _complete(stored: Round, shards: int, reward: Reward, config: ScoringConfig, seconds: float) -> None:
    stored.await_shards("rewards", shards)
    stored.complete(
        "rewards",
        seconds=seconds,
        reward=reward.name,
        on_failure=config.on_failure,
        **reward_statistics(stored),
    )


def _apply_failure_policy(stored: Round, number: int, config: ScoringConfig) -> bool:
    """Apply the current `on_failure` to a scored shard's failures; False if the shard must be scored again."""
    table = stored.read_shard("rewards", number)
    failed = table["failure"].is_valid()
    if not pc.any(failed).as_py():
        return True
    if config.on_failure == "error":
        return False
    rewards = pc.if_else(failed, pa.scalar(config.substitute, pa.float64()), table["reward"])
    if not rewards.equals(table["reward"]):
        stored.write_shard("rewards", number, table.set_column(2, "reward", rewards))
    return True


def _call_ends(prompt_ids: pa.ChunkedArray, prompts: int) -> list[int]:
    """Row after the last one of each call, with `prompts` prompts a call; the same after a resume."""
    runs = pc.run_end_encode(prompt_ids.combine_chunks()).run_ends.to_pylist()  # a prompt's responses are adjacent
    return [*runs[prompts - 1 : -1 : prompts], *runs[-1:]]


def _reward_table(table: pa.Table, outcomes: list[Outcome], config: ScoringConfig) -> pa.Table:
    results = [o if isinstance(o, RewardResult) else None for o in outcomes]
    failures = [f"{o.kind}: {o.detail}" if isinstance(o, Failure) else None for o in outcomes]
    parts = list(dict.fromkeys(name for r in results if r is not None for name in r.components))
    columns: dict[str, Any] = {
        "prompt_id": table["prompt_id"],
        "response_index": table["response_index"],
        "reward": pa.array([config.substitute if r is None else r.reward for r in results], pa.float64()),
        "failure": pa.array(failures, pa.string()),
        "truncated_tokens": pa.array([0 if r is None else r.truncated_tokens for r in results], pa.int32()),
        **{
            f"reward/{n}": pa.array([None if r is None else r.components.get(n) for r in results], pa.float64())
            for n in parts
        },
    }
    return pa.table(columns)


def _outcome(entry: Entry) -> Outcome:
    kind, *values = entry
    return RewardResult(*values) if kind == "result" else Failure(*values)


def _entry(outcome: Outcome) -> list[Any]:
    if isinstance(outcome, Failure):
        return ["failure", outcome.kind, outcome.detail]
    return ["result", outcome.reward, dict(outcome.components), outcome.truncated_tokens]


def reward_statistics(stored: Round) -> dict[str, Any]:
    """Statistics of a round's rewards, for the manifest.

    Returns:
        Mean and standard deviation over all scored responses (`mean`, `std`), the means of each prompt's best and worst
        reward (`best`, `worst`) and of each component, the numbers of scored and truncated responses, and failures by
        kind.

    Raises:
        InputError: No response has a reward.
    """
    table = stored.read("rewards")
    failures = Counter(text.split(":")[0] for text in table["failure"].drop_null().to_pylist() if text)
    scored = table.filter(table["reward"].is_valid())
    if len(scored) == 0:
        first = next((text for text in table["failure"].to_pylist() if text), "")
        stored.clear("rewards")
        raise InputError(
            f"The reward failed for all {len(table)} responses of {stored.path}. The first failure: {first}"
        )
    rewards = scored["reward"].to_numpy()
    grouped = scored.group_by("prompt_id", use_threads=False).aggregate([("reward", "max"), ("reward", "min")])
    names = [n for n in table.column_names if n.startswith("reward/")]
    return {
        "scored": len(scored),
        "failures": dict(failures),
        "truncated": int((table["truncated_tokens"].to_numpy() > 0).sum()),
        "mean": float(rewards.mean()),
        "std": float(rewards.std()),
        "best": float(grouped["reward_max"].to_numpy().mean()),
        "worst": float(grouped["reward_min"].to_numpy().mean()),
        "components": {n.removeprefix("reward/"): _mean(table[n]) for n in names},
    }


def _mean(column: pa.ChunkedArray) -> float:
    values = column.drop_null().to_numpy()
    return float(np.mean(values)) if len(values) else 0.0


def prompt_means(stored: Round) -> dict[str, float]:
    """Mean reward of each prompt with a scored response, by prompt id."""
    table = stored.read("rewards", ["prompt_id", "reward"])
    grouped = (
        table.filter(table["reward"].is_valid())
        .group_by("prompt_id", use_threads=False)
        .aggregate([("reward", "mean")])
    )
    return dict(zip(grouped["prompt_id"].to_pylist(), grouped["reward_mean"].to_pylist(), strict=True))
