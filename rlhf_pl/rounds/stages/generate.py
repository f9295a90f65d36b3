"""Samples the responses of a round, shard by shard."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlhf_pl.data.prompts import Prompt
from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.models.chat import Message
from rlhf_pl.rollout.base import PromptTokens, Response, Sampler, SamplingConfig
from rlhf_pl.rounds.stages.sampler_logps import DESCRIPTION, SUM, SUM_FIELD, TOKENS_FIELD, token_logps
from rlhf_pl.rounds.stages.sampler_logps import TOKENS as LOGPS
from rlhf_pl.store.round_store import Round
from rlhf_pl.store.waves import count_waves

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
        SUM_FIELD,
        ("columns", pa.string()),
    ]
)
Report = Callable[[int, str], None]


def prompt_seed(run_seed: int, name: str, prompt_id: str) -> int:
    """Seed of a prompt's responses: a hash, so that no two prompts, rounds or ranks share a random stream."""
    digest = hashlib.sha256(f"{run_seed}:{name}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def generate(
    stored: Round,
    prompts: Sequence[Prompt],
    sampler: Sampler,
    sampling: SamplingConfig,
    tokenizer: Any,
    run_seed: int,
    shards: Sequence[range],
    report: Report = lambda count, note: None,
    ranks: Ranks = Ranks(),  # noqa: B008 - one process
    on_shard: Callable[[int], None] = lambda number: None,
    logps: bool = False,
    stream: bool = False,
    per_token: bool = False,
) -> None:
    """Sample the responses to all prompts of the missing shards.

    Shards are sampled one after the other, each from a clean engine. The last digits of log-probs depend on what is
    computed together, so a shard comes out the same whenever and wherever it is sampled. The missing shards are divided
    among the ranks, or among groups of ranks that share an engine; the first rank of a group writes.

    Args:
        stored: The round.
        prompts: All prompts of the round.
        sampler: Holds the policy's weights.
        sampling: How responses are sampled.
        tokenizer: The policy's tokenizer, for texts.
        run_seed: The run's seed.
        shards: Indices of the prompts of each shard, in order.
        report: Receives (prompts done, note).
        ranks: The run's ranks; all of them call this function.
        on_shard: Receives the number of every shard that this rank has written.
        logps: Whether the sampler reports log-probs, whose sums are stored.
        stream: Request all of a rank's shards at once. The engine is then never idle between two shards, but what is
            computed together depends on which shards are missing.
        per_token: Whether the log-prob of every token is stored as well.
    """
    seeds = [prompt_seed(run_seed, stored.name, p.prompt_id) for p in prompts]
    schema = RESPONSES.append(TOKENS_FIELD) if per_token else RESPONSES
    done = ranks.broadcast(set(stored.shards("responses")))
    shard_of = {index: number for number, shard in enumerate(shards) for index in shard}
    per_engine = sampler.ranks_per_engine
    missing = [number for number in range(len(shards)) if number not in done]
    mine = missing[ranks.rank // per_engine :: ranks.size // per_engine]
    started, tokens = time.monotonic(), 0
    for number, shard in enumerate(shards):
        if number in done:
            report(len(shard), "")
    for part in [mine] if stream and mine else [[number] for number in mine]:
        left = {number: set(shards[number]) for number in part}
        indices = sorted(index for shard in left.values() for index in shard)
        sampler.reset()
        requests = [PromptTokens(list(prompts[i].token_ids), seeds[i], logps or per_token) for i in indices]
        sampled: dict[int, list[Response]] = {}
        for position, responses in sampler.generate(requests, sampling):
            index = indices[position]
            sampled[index] = responses
            tokens += sum(len(r.token_ids) for r in responses)
            report(1, _speed(tokens, started))
            number = shard_of[index]
            left[number].discard(index)
            if left[number] or ranks.rank % per_engine:
                continue
            parts = (_response_rows(prompts[i], seeds[i], sampled.pop(i), tokenizer, per_token) for i in shards[number])
            rows = list(itertools.chain.from_iterable(parts))
            stored.write_shard("responses", number, pa.Table.from_pylist(rows, schema=schema))
            on_shard(number)
    total = sum(ranks.all_gather(tokens if ranks.rank % per_engine == 0 else 0))
    seconds = time.monotonic() - started
    report(sum(len(shards[number]) for number in missing if number not in mine), _speed(total, started))
    ranks.run_on_rank_zero(lambda: _complete(stored, len(shards), len(prompts), seconds, total, sampling, per_token))


def _speed(tokens: int, started: float) -> str:
    return f"{tokens / (time.monotonic() - started):.0f} tokens/s"


def _complete(
    stored: Round, shards: int, prompts: int, seconds: float, tokens: int, sampling: SamplingConfig, per_token: bool
) -> None:
    stored.await_shards("responses", shards)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    has_logps = False
    for shard in stored.read_shards("responses", ["finished", "response_tokens", SUM]):
        parts.append((pc.list_value_length(shard["response_tokens"]).to_numpy(), shard["finished"].to_numpy()))
        has_logps = has_logps or shard[SUM].null_count < len(shard)
    lengths, finished = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    stored.complete(
        "responses",
        prompts=prompts,
        responses=len(lengths),
        tokens=int(lengths.sum()),
        tokens_mean=float(lengths.mean()),
        finished_share=float(finished.mean()),
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        sampling=vars(sampling),
        **({SUM: DESCRIPTION} if has_logps else {}),
        **({LOGPS: DESCRIPTION} if per_token else {}),
        **count_waves(stored.manifest),
    )


def _response_rows(
    prompt: Prompt, seed: int, responses: list[Response], tokenizer: Any, per_token: bool
) -> Iterator[dict[str, Any]]:
    for index, response in enumerate(responses):
        yield {
            "prompt_id": prompt.prompt_id,
            "response_index": index,
            "prompt": _as_text(prompt.messages),
            "response": tokenizer.decode(response.token_ids, skip_special_tokens=True),
            "finished": response.finished,
            "seed": seed + index,
            "prompt_tokens": prompt.token_ids,
            "response_tokens": response.token_ids,
            SUM: sum(response.logps) if response.logps else None,
            **({LOGPS: token_logps(response)} if per_token else {}),
            "columns": json.dumps(dict(prompt.columns), ensure_ascii=False, default=str),
        }


def _as_text(messages: Sequence[Message]) -> str:
    """Messages as JSON with sorted keys, so that equal conversations are equal texts."""
    return json.dumps([dict(sorted(m.items())) for m in messages], ensure_ascii=False, default=str)
