"""Score the answers of a round, shard by shard, keeping what is scored."""

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
from rlhf_pl.rewards.guard import Outcome, ScoringConfig, guarded_scores
from rlhf_pl.rewards.withhold import without_thinking
from rlhf_pl.rounds.stages.generate import Report
from rlhf_pl.store.journal import Entry, Journal
from rlhf_pl.store.round_store import Round
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redact

_WANTED = ("prompt_id", "response_index", "response", "finished", "prompt_tokens", "response_tokens")
_TAIL = 32  # tokens of a prompt's end, in which a template opens the thinking


class ShardScorer:
    """Gives the answers of a shard their rewards.

    What a call returned is kept in a journal beside the shards until its shard is written, so that nothing that was
    scored is scored again.

    Args:
        stored: The round.
        prompts: Its prompts.
        reward: Scores.
        config: How it is called.
        tokenizer: The policy's; needed where thinking is withheld.
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
        go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        """Score and write a shard. `report` gets (answers done, note); `go_on` is asked before every call."""
        table = self.stored.read_shard("responses", number, _WANTED)
        made_of = [self.stored.shards("responses", number)[number].name, redact(self.reward.fingerprint())]
        made_of += [json.dumps(self.config.withheld)] if self.config.withheld else []
        journal = Journal(self.stored.path / "rewards" / f"_{number:05d}.journal", made_of)
        outcomes = [_outcome(entry) for entry in journal.read()]
        report(len(outcomes), "")

        def keep(found: list[Outcome]) -> None:
            journal.add([_entry(outcome) for outcome in found])
            report(len(found), "")

        for end in _ends_of_calls(table["prompt_id"], self.config.prompts_per_call):
            if end <= len(outcomes):
                continue
            if not go_on():
                return
            batch = self._samples(table.slice(len(outcomes), end - len(outcomes)))
            try:
                outcomes += guarded_scores(self.reward, batch, self.config, keep)
            except InputError as error:
                raise InputError(f"{error} Answers scored so far are kept.") from error
        self.stored.write_shard("rewards", number, _reward_table(table, outcomes, self.config))

    def _samples(self, rows: pa.Table) -> list[Sample]:
        """The answers of one call; no others' tokens become Python's."""
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
        prompts = [self.tokenizer.decode(ids.values[-_TAIL:].to_pylist()) for ids in rows["prompt_tokens"]]
        return [
            without_thinking(sample, self.config.thinking_marks, prompt, self.tokenizer)
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
    """Give every answer its reward. `report` gets (answers done, note); the shards are dealt out to the ranks.

    Raises:
        InputError: An answer has no reward and the policy for failures is `error`, or none has one.
    """
    scorer = ShardScorer(stored, prompts, reward, config, tokenizer)
    started = time.monotonic()
    done = ranks.broadcast(set(stored.shards("rewards")))
    answers = ranks.broadcast(set(stored.shards("responses")))
    stored.await_shards("responses", len(answers))
    todo = [n for n in answers if n not in done] + [n for n in answers if n in done]
    of_others = stored.info("responses")["responses"]

    def tell(count: int, note: str) -> None:
        nonlocal of_others
        of_others -= count
        report(count, note)

    for number in sorted(todo[ranks.rank :: ranks.size]):
        if number in done and _settle_failures(stored, number, config):
            tell(len(stored.read_shard("rewards", number, ["prompt_id"])), "")
        else:
            scorer(number, tell)
    ranks.barrier()
    seconds = time.monotonic() - started
    if of_others:
        report(of_others, "")
    ranks.run_on_rank_zero(lambda: _complete(stored, len(answers), reward, config, seconds))


def _complete(stored: Round, shards: int, reward: Reward, config: ScoringConfig, seconds: float) -> None:
    stored.await_shards("rewards", shards)
    stored.complete(
        "rewards",
        seconds=seconds,
        reward=reward.name,
        on_failure=config.on_failure,
        **reward_statistics(stored),
    )


def _settle_failures(stored: Round, number: int, config: ScoringConfig) -> bool:
    """Bring a shard's failed answers under the present policy for failures; False if it has to be scored again."""
    table = stored.read_shard("rewards", number)
    failed = table["failure"].is_valid()
    if not pc.any(failed).as_py():
        return True
    if config.on_failure == "error":
        return False
    settled = pc.if_else(failed, pa.scalar(config.substitute, pa.float64()), table["reward"])
    if not settled.equals(table["reward"]):
        stored.write_shard("rewards", number, table.set_column(2, "reward", settled))
    return True


def _ends_of_calls(prompt_ids: pa.ChunkedArray, prompts: int) -> list[int]:
    """Where the calls for so many prompts end among the rows: the same after a resume."""
    runs = pc.run_end_encode(prompt_ids.combine_chunks()).run_ends.to_pylist()  # a prompt's responses are side by side
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
    """Mean and spread over the scored answers, the mean of each prompt's best and worst, and failures by kind.

    Raises:
        InputError: No answer has a reward.
    """
    table = stored.read("rewards")
    failures = Counter(text.split(":")[0] for text in table["failure"].drop_null().to_pylist() if text)
    scored = table.filter(table["reward"].is_valid())
    if len(scored) == 0:
        first = next((text for text in table["failure"].to_pylist() if text), "")
        stored.clear("rewards")
        raise InputError(f"The reward failed for all {len(table)} answers of {stored.path}. The first: {first}")
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
    """Each prompt's mean reward, of the prompts that have one."""
    table = stored.read("rewards", ["prompt_id", "reward"])
    grouped = (
        table.filter(table["reward"].is_valid())
        .group_by("prompt_id", use_threads=False)
        .aggregate([("reward", "mean")])
    )
    return dict(zip(grouped["prompt_id"].to_pylist(), grouped["reward_mean"].to_pylist(), strict=True))
