"""Tasks of the trials: rewards of different scales and densities on the prompts of the repository."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from examples.short_answer import score as short_answer

PROMPTS = Path(__file__).parents[2] / "data" / "prompts.jsonl"
HELD_OUT = 64  # prompts; more than the default holds out of few prompts, to tell settings apart


def sentence_length(response: str) -> float:
    """Minus the distance of the mean sentence length from 8 words, in words: a reward of some -20 to 0."""
    sentences = [s.split() for s in response.replace("!", ".").replace("?", ".").split(".") if s.strip()]
    return -abs(sum(map(len, sentences)) / len(sentences) - 8) if sentences else -20.0


def ends_with_question(response: str) -> float:
    """1 for a question mark in the response, else 0: few responses have one at first."""
    return float("?" in response)


@dataclass(frozen=True)
class Task:
    """A reward, the number of training prompts, and the maximum tokens of a response."""

    reward: Callable[..., float]
    prompts: int
    tokens: int = 64


TASKS = {
    "short": Task(short_answer, 308),
    "sentences": Task(sentence_length, 40, 96),
    "question": Task(ends_with_question, 120, 96),
}


def save_prompts(task: Task, folder: Path) -> tuple[Path, Path]:
    """Write the prompts of a task and those held out; returns their files."""
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, (rows[HELD_OUT : HELD_OUT + task.prompts], rows[:HELD_OUT]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return files
