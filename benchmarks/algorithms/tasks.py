"""The tasks on which the algorithms are compared: a policy, prompts, a reward, and the size of a run."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import MODEL
from benchmarks.reward_over_time import PROMPTS
from benchmarks.toy_task import TOKENS, save_prompts, save_toy_model


@dataclass(frozen=True)
class Task:
    """What all runs of a task share.

    Args:
        reward: The reward function, by its import path.
        eta: REBEL's eta, nats per reward unit.
        rates: Learning rates that every algorithm is tried with.
        rounds: Rounds of a run.
        prompts: Prompts per round.
        update: Prompts per update.
        responses: Responses per prompt.
        max_tokens: Responses are truncated at this length, tokens.
        temperature: Of all sampling, and of the log-probs in KL and entropy.
        held_out: Number of held-out prompts.
        held_out_responses: Responses per held-out prompt.
        every: Rounds between two evaluations on the held-out prompts.
        bfloat16: Compute in bfloat16, on float32 weights, as in configs/quickstart.yaml; evaluations are in float32.
    """

    reward: str
    eta: float
    rates: tuple[float, ...]
    rounds: int
    prompts: int
    update: int
    responses: int
    max_tokens: int
    temperature: float
    held_out: int
    held_out_responses: int
    every: int = 1
    bfloat16: bool = False


TASKS = {
    "toy": Task(
        reward="benchmarks.toy_task.score",
        eta=8.0,
        rates=(3e-3, 1e-2, 2e-2, 4e-2),
        rounds=15,
        prompts=32,
        update=8,
        responses=4,
        max_tokens=TOKENS,
        temperature=1.0,
        held_out=32,
        held_out_responses=4,
    ),
    "quickstart": Task(
        reward="examples.short_answer.score",
        eta=5.0,
        rates=(3e-5, 1e-4, 2e-4, 4e-4),
        rounds=8,
        prompts=4,
        update=4,
        responses=4,
        max_tokens=48,
        temperature=0.8,
        held_out=12,
        held_out_responses=2,
        every=4,
        bfloat16=True,
    ),
}


@dataclass(frozen=True)
class Files:
    """Where a task's files are: the policy's folder, and prompts for training and for evaluation in JSON Lines."""

    model: Path
    train: Path
    held_out: Path


def prepare(name: str, folder: Path) -> Files:
    """Write the files of a task into a folder."""
    model, prompts = MODEL, PROMPTS
    if name == "toy":
        model, prompts = folder / "model", folder / "prompts.jsonl"
        save_toy_model(model)
        save_prompts(prompts)
    files = Files(model, folder / "train.jsonl", folder / "held_out.jsonl")
    with prompts.open() as lines:
        files.held_out.write_text("".join(itertools.islice(lines, TASKS[name].held_out)))
        files.train.write_text("".join(lines))
    return files


def read_prompts(file: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
