"""The stages of a round before training: generate, score, select, log-probs. Each writes its part of the store."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rlhf_pl.data.prompts import Prompt
from rlhf_pl.pairs import PairSelector
from rlhf_pl.rewards.base import Reward, Sample, checked_scores
from rlhf_pl.rollout.base import PromptTokens, Response, Sampler, SamplingConfig
from rlhf_pl.rounds import Round
from rlhf_pl.rows import Row, RowBatch, batches_by_length, pad_rows

TOKENS = pa.list_(pa.int32())
RESPONSES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("response_index", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("finished", pa.bool_()),
        ("seed", pa.int64()),
        ("prompt_tokens", TOKENS),
        ("response_tokens", TOKENS),
        ("sampler_logp", pa.float64()),
        ("columns", pa.string()),
    ]
)
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
Report = Callable[[int, str], None]
LogpsFunction = Callable[[RowBatch, float], Tensor]


def prompt_seed(run_seed: int, name: str, prompt_id: str) -> int:
    """Seed of a prompt's answers: a hash, so that no two prompts, rounds or ranks share a random stream."""
    digest = hashlib.sha256(f"{run_seed}:{name}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def generate(
    stored: Round,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    sampling: SamplingConfig,
    tokenizer: Any,
    run_seed: int,
    prompts_per_shard: int,
    report: Report = lambda count, note: None,
) -> None:
    """Draw the answers of all prompts whose shard is not there yet. `report` gets (prompts done, note)."""
    shards = [range(start, min(start + prompts_per_shard, len(prompts))) for start in
              range(0, len(prompts), prompts_per_shard)]  # fmt: skip
    name = f"{stored.path.parent.name}/{stored.path.name}"
    seeds = [prompt_seed(run_seed, name, p.prompt_id) for p in prompts]
    todo = [i for number, shard in enumerate(shards) if not stored.has_shard("responses", number) for i in shard]
    report(len(prompts) - len(todo), "")
    answers: dict[int, list[Response]] = {}
    started, tokens = time.monotonic(), 0
    requests = [PromptTokens(list(prompts[i].token_ids), seeds[i]) for i in todo]
    for position, responses in sampler.generate(requests, sampling):
        index = todo[position]
        answers[index] = responses
        tokens += sum(len(r.token_ids) for r in responses)
        report(1, f"{tokens / (time.monotonic() - started):.0f} tokens/s")
        number = index // prompts_per_shard
        if all(i in answers for i in shards[number]):
            rows = [
                row for i in shards[number] for row in _response_rows(prompts[i], seeds[i], answers.pop(i), tokenizer)
            ]
            stored.write_shard("responses", number, pa.Table.from_pylist(rows, schema=RESPONSES))
    seconds = time.monotonic() - started
    table = stored.read("responses")
    lengths = table["response_tokens"].combine_chunks().value_lengths().to_numpy()
    stored.complete(
        "responses",
        prompts=len(prompts),
        responses=len(table),
        tokens=int(lengths.sum()),
        tokens_mean=float(lengths.mean()),
        finished_share=float(table["finished"].to_numpy().mean()),
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        sampling=vars(sampling),
    )


def _response_rows(prompt: Prompt, seed: int, responses: list[Response], tokenizer: Any) -> Iterator[dict[str, Any]]:
    for index, response in enumerate(responses):
        yield {
            "prompt_id": prompt.prompt_id,
            "response_index": index,
            "prompt": json.dumps(prompt.messages, ensure_ascii=False),
            "response": tokenizer.decode(response.token_ids, skip_special_tokens=True),
            "finished": response.finished,
            "seed": seed + index,
            "prompt_tokens": prompt.token_ids,
            "response_tokens": response.token_ids,
            "sampler_logp": sum(response.logps),
            "columns": json.dumps(dict(prompt.columns), ensure_ascii=False, default=str),
        }


def score(stored: Round, prompts: Sequence[Prompt], reward: Reward, report: Report = lambda count, note: None) -> None:
    """Give every answer its reward, shard by shard. `report` gets (answers done, note)."""
    by_id = {p.prompt_id: p for p in prompts}
    started = time.monotonic()
    for number in stored.shards("responses"):
        table = stored.read_shard("responses", number)
        if not stored.has_shard("rewards", number):
            rows = table.select(["prompt_id", "response", "response_tokens", "finished"]).to_pylist()
            samples = [
                Sample(
                    row["prompt_id"],
                    by_id[row["prompt_id"]].messages,
                    row["response"],
                    row["response_tokens"],
                    row["finished"],
                    by_id[row["prompt_id"]].columns,
                )
                for row in rows
            ]
            results = checked_scores(reward, samples)
            parts = list(dict.fromkeys(name for r in results for name in r.components))
            columns: dict[str, Any] = {
                "prompt_id": table["prompt_id"],
                "response_index": table["response_index"],
                "reward": pa.array([r.reward for r in results], pa.float64()),
                **{f"reward/{n}": pa.array([r.components.get(n) for r in results], pa.float64()) for n in parts},
            }
            stored.write_shard("rewards", number, pa.table(columns))
        report(len(table), "")
    stored.complete("rewards", seconds=time.monotonic() - started, reward=reward.name, **reward_statistics(stored))


def reward_statistics(stored: Round) -> dict[str, Any]:
    """Mean and spread over all answers, and the mean of each prompt's best and worst."""
    table = stored.read("rewards")
    rewards = table["reward"].to_numpy()
    grouped = table.group_by("prompt_id").aggregate([("reward", "max"), ("reward", "min")])
    names = [n for n in table.column_names if n.startswith("reward/")]
    return {
        "mean": float(rewards.mean()),
        "std": float(rewards.std()),
        "best": float(grouped["reward_max"].to_numpy().mean()),
        "worst": float(grouped["reward_min"].to_numpy().mean()),
        "components": {n.removeprefix("reward/"): float(table[n].to_numpy().mean()) for n in names},
    }


def prompt_means(stored: Round) -> dict[str, float]:
    """Each prompt's mean reward."""
    grouped = stored.read("rewards").group_by("prompt_id").aggregate([("reward", "mean")])
    return dict(zip(grouped["prompt_id"].to_pylist(), grouped["reward_mean"].to_pylist(), strict=True))


def select(stored: Round, selector: PairSelector, run_seed: int, limit: int | None = None) -> None:
    """Make pairs of the scored answers, at most `limit`, and count the prompts that give none, by reason."""
    rows = stored.read("responses").to_pylist()
    for row, reward in zip(rows, stored.read("rewards")["reward"].to_pylist(), strict=True):
        row["reward"] = reward
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    dropped = {"no_reward_difference": 0, "same_answer": 0}
    pairs = []
    for prompt_id, answers in groups.items():
        picked = selector(
            [a["reward"] for a in answers],
            [len(a["response_tokens"]) for a in answers],
            [a["finished"] for a in answers],
            prompt_seed(run_seed, "select", prompt_id),
        )
        different = [(c, r) for c, r in picked if answers[c]["response_tokens"] != answers[r]["response_tokens"]]
        if not picked:
            dropped["no_reward_difference"] += 1
        elif not different:
            dropped["same_answer"] += 1
        pairs += [_pair_row(answers[c], answers[r]) for c, r in different]
    pairs = pairs[:limit]
    stored.write_shard("pairs", 0, pa.Table.from_pylist(pairs, schema=PAIRS))
    stored.complete("pairs", prompts=len(groups), pairs=len(pairs), dropped=dropped, selector=type(selector).__name__)


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


def pair_logps(
    stored: Round,
    policies: dict[str, LogpsFunction],
    tokens_per_batch: int,
    temperature: float,
    report: Report = lambda count, note: None,
) -> None:
    """Summed log-probs of every pair's two answers under each of `policies` (`old`, and perhaps `reference`).

    Args:
        stored: The round; its pairs are read, its `logps` written.
        policies: (rows, temperature) -> token log-probs, shape (R, T), by name.
        tokens_per_batch: Padded tokens per batch.
        temperature: The temperature the answers were drawn at.
        report: Gets (answers done, note).
    """
    started = time.monotonic()
    pairs = stored.read("pairs").select(["prompt_id", "prompt_tokens", "chosen_tokens", "rejected_tokens"]).to_pylist()
    columns: dict[str, Any] = {"prompt_id": pa.array([p["prompt_id"] for p in pairs], pa.string())}
    rows = [Row(p["prompt_tokens"], p[f"{which}_tokens"]) for which in ("chosen", "rejected") for p in pairs]
    for name, policy in policies.items():
        logps = torch.zeros(len(rows), dtype=torch.float64)
        for batch in batches_by_length(rows, tokens_per_batch):
            logps[batch] = policy(pad_rows([rows[i] for i in batch]), temperature).sum(-1).double().cpu()
            report(len(batch), "")
        chosen, rejected = logps.view(2, -1).numpy()
        columns |= {f"chosen_{name}_logp": chosen, f"rejected_{name}_logp": rejected}
    stored.write_shard("logps", 0, pa.table(columns))
    stored.complete("logps", seconds=time.monotonic() - started, policies=list(policies))
