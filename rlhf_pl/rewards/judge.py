"""A language model as the judge, behind any OpenAI-compatible chat endpoint."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from rlhf_pl.models.chat import spoken
from rlhf_pl.rewards.base import Failure, Reward, RewardResult, Sample
from rlhf_pl.rewards.remote import Service, WrongAnswerError
from rlhf_pl.utils.errors import InputError, at_least
from rlhf_pl.utils.secrets import redact

RUBRIC = (
    "Judge how well the assistant's answer serves the user: is it correct, does it do what was asked, is it clear and "
    "no longer than it needs to be?"
)
ResponseFormat = Literal["json_schema", "text"]


class _Judge:
    """A chat endpoint, a rubric, and how verdicts are asked for."""

    def __init__(
        self,
        service: Service,
        model: str,
        rubric: str,
        response_format: ResponseFormat,
        max_tokens: int,
        temperature: float,
    ) -> None:
        if max_tokens < 1:
            raise InputError(f"`rollout.reward.max_tokens` must be 1 or more, got {max_tokens}.")
        self.service, self.model, self.rubric = service, model, _text_or_file(rubric)
        at_least("rollout.reward", temperature=(temperature, 0))
        self.response_format, self.max_tokens, self.temperature = response_format, max_tokens, temperature

    def request(self, task: str, schema: dict[str, Any]) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": task}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.response_format == "json_schema":
            verdict = {"name": "verdict", "strict": True, "schema": schema}
            payload["response_format"] = {"type": "json_schema", "json_schema": verdict}
        return payload


def _text_or_file(rubric: str) -> str:
    """A rubric, or the text of the file that `rubric` names."""
    if len(rubric) < 256 and "\n" not in rubric and rubric.endswith((".txt", ".md")):
        file = Path(rubric)
        if not file.is_file():
            raise InputError(f"`rollout.reward.rubric`: no file {rubric!r}.")
        return file.read_text(encoding="utf-8")
    if not rubric.strip():
        raise InputError("`rollout.reward.rubric` is empty.")
    return rubric


def _chat_url(url: str) -> str:
    url = url.rstrip("/")
    return url if url.endswith("/chat/completions") else f"{url}/chat/completions"


def _conversation(sample: Sample) -> str:
    return "\n\n".join(f"[{m['role']}]\n{spoken(m)}" for m in sample.messages)


def _answer(sample: Sample) -> str:
    return spoken(sample.response_message)


def _said(body: Any) -> str:
    try:
        content = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise WrongAnswerError("expected a chat completion with choices[0].message.content") from None
    if not isinstance(content, str) or not content.strip():
        raise WrongAnswerError("the judge said nothing; raise `max_tokens` if it thinks before it answers")
    return content


def _verdict(body: Any, key: str) -> Any:
    """What the judge put under `key`: the last JSON object with it, or a line such as `score: 7`."""
    text = _said(body)
    for found in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            value = json.loads(found)
        except ValueError:
            continue
        if key in value:
            return value[key]
    if lines := re.findall(rf"(?i)\b{key}\b\W{{1,5}}(-?\d+(?:\.\d+)?|\w+)", text):
        return lines[-1]
    raise WrongAnswerError(f'the judge gave no "{key}": {redact(text)[-120:]!r}')


class JudgeScoreReward(Reward):
    """A judge that gives every answer a score; the reward is that score scaled to 0 to 1.

    Args:
        url: Base URL of the endpoint, such as `http://localhost:8000/v1`.
        model: Name of the judging model there.
        rubric: What to judge by, or a .txt or .md file with it.
        lowest: Lowest score.
        highest: Highest score.
        response_format: `json_schema` has the server hold the judge to the form of a verdict; `text` reads it from
            free text, for servers that can't.
        max_tokens: Longest verdict, tokens.
        temperature: Of the judge.
        concurrency: Requests under way at a time.
        timeout_s: Time limit of an attempt, seconds.
        retries: Further attempts after an error or a verdict that can't be read.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        api_key_env: Environment variable with a key that is sent as a bearer token; null for none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str = RUBRIC,
        lowest: int = 1,
        highest: int = 10,
        response_format: ResponseFormat = "json_schema",
        max_tokens: int = 256,
        temperature: float = 0.0,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        api_key_env: str | None = None,
    ) -> None:
        if lowest >= highest:
            raise InputError(f"`rollout.reward`: lowest ({lowest}) must be below highest ({highest}).")
        service = Service(_chat_url(url), timeout_s, retries, backoff_s, concurrency, api_key_env)
        self._judge = _Judge(service, model, rubric, response_format, max_tokens, temperature)
        self.url, self.model, self.rubric = url, model, self._judge.rubric
        self.lowest, self.highest, self.temperature = lowest, highest, temperature

    @property
    def name(self) -> str:
        return f"JudgeScoreReward({self.model})"

    @property
    def trial(self) -> bool:
        return True

    @property
    def is_remote(self) -> bool:
        return True

    @property
    def limits_itself(self) -> bool:
        return True

    def check(self, samples: Sequence[Sample]) -> None:
        self._judge.service.check()

    def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
        schema = {
            "type": "object",
            "properties": {"score": {"type": "integer", "minimum": self.lowest, "maximum": self.highest}},
            "required": ["score"],
            "additionalProperties": False,
        }
        payloads = [self._judge.request(self._task(sample), schema) for sample in batch]
        scores = self._judge.service.map(payloads, lambda i, body: self._scaled(_verdict(body, "score")))
        return [
            s if isinstance(s, Failure) else RewardResult(s, {"score": self.lowest + s * (self.highest - self.lowest)})
            for s in scores
        ]

    def _task(self, sample: Sample) -> str:
        return (
            f"{self.rubric}\n\n# Conversation\n\n{_conversation(sample)}\n\n# The assistant's answer\n\n"
            f"{_answer(sample)}\n\n# Your verdict\n\nA whole number from {self.lowest} (worst) to {self.highest} (best)"
            ', as JSON: {"score": <number>}'
        )

    def _scaled(self, value: Any) -> float:
        try:
            score = float(value)
        except (TypeError, ValueError):
            raise WrongAnswerError(f"the judge's score is {value!r}; expected a number") from None
        if not self.lowest <= score <= self.highest:
            raise WrongAnswerError(f"the judge's score is {score:g}; expected {self.lowest} to {self.highest}")
        return (score - self.lowest) / (self.highest - self.lowest)


class JudgePairReward(Reward):
    """A judge that compares answers two by two; the reward is the share of comparisons an answer wins, ties half.

    Each comparison is asked in both orders, so that a liking for the first place cancels out. Without
    `reference_column` all answers to a prompt are compared with each other: the mean reward of a prompt is then always
    one half, so it tells pairs apart but not policies. With it, every answer is compared with the row's reference
    answer.

    Args:
        url: Base URL of the endpoint, such as `http://localhost:8000/v1`.
        model: Name of the judging model there.
        rubric: What to judge by, or a .txt or .md file with it.
        reference_column: Column with an answer to compare with; null to compare a prompt's answers with each other.
        response_format: `json_schema` has the server hold the judge to the form of a verdict; `text` reads it from
            free text, for servers that can't.
        max_tokens: Longest verdict, tokens.
        temperature: Of the judge.
        concurrency: Requests under way at a time.
        timeout_s: Time limit of an attempt, seconds.
        retries: Further attempts after an error or a verdict that can't be read.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        api_key_env: Environment variable with a key that is sent as a bearer token; null for none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str = RUBRIC,
        reference_column: str | None = None,
        response_format: ResponseFormat = "json_schema",
        max_tokens: int = 256,
        temperature: float = 0.0,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        api_key_env: str | None = None,
    ) -> None:
        service = Service(_chat_url(url), timeout_s, retries, backoff_s, concurrency, api_key_env)
        self._judge = _Judge(service, model, rubric, response_format, max_tokens, temperature)
        self.url, self.model, self.rubric = url, model, self._judge.rubric
        self.reference_column, self.temperature = reference_column, temperature

    @property
    def name(self) -> str:
        return f"JudgePairReward({self.model})"

    @property
    def trial(self) -> bool:
        return True

    @property
    def is_remote(self) -> bool:
        return True

    @property
    def limits_itself(self) -> bool:
        return True

    @property
    def by_prompt(self) -> bool:
        return self.reference_column is None

    def check(self, samples: Sequence[Sample]) -> None:
        self._judge.service.check()
        for sample in samples:
            self._reference(sample)

    def _reference(self, sample: Sample) -> str:
        if self.reference_column is None:
            return ""
        value = sample.columns.get(self.reference_column)
        if not isinstance(value, str) or not value.strip():
            raise InputError(
                f"JudgePairReward: prompt_id {sample.prompt_id!r} has no text in the column "
                f"`{self.reference_column}` (reference_column). Columns: {', '.join(sample.columns) or 'none'}."
            )
        return value

    def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
        pairs = self._pairs(batch)
        tasks = []
        for first, second in pairs:
            answers = (
                _answer(batch[first]),
                self._reference(batch[first]) if second is None else _answer(batch[second]),
            )
            tasks += [self._task(batch[first], *answers), self._task(batch[first], *reversed(answers))]
        schema = {
            "type": "object",
            "properties": {"better": {"type": "string", "enum": ["A", "B", "tie"]}},
            "required": ["better"],
            "additionalProperties": False,
        }
        verdicts = self._judge.service.map(
            [self._judge.request(task, schema) for task in tasks], lambda i, body: _share_of_a(_verdict(body, "better"))
        )
        won: list[list[float]] = [[] for _ in batch]
        failed: dict[int, Failure] = {}
        for (first, second), there, back in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            for index in (first, *([] if second is None else [second])):
                for verdict in (there, back):
                    if isinstance(verdict, Failure):
                        failed[index] = verdict
            if isinstance(there, Failure) or isinstance(back, Failure):
                continue
            share = (there + 1 - back) / 2
            won[first].append(share)
            if second is not None:
                won[second].append(1 - share)
        alone = Failure("exception", "there is no other answer to this prompt to compare with; draw 2 or more, also on "
                        "held-out prompts (val_num_responses), or name a reference_column.", True)  # fmt: skip
        return [
            failed.get(i) or (RewardResult(sum(shares) / len(shares)) if shares else alone)
            for i, shares in enumerate(won)
        ]

    def _pairs(self, batch: Sequence[Sample]) -> list[tuple[int, int | None]]:
        """Which answers are compared; None for the reference."""
        if self.reference_column is not None:
            return [(i, None) for i in range(len(batch))]
        groups: dict[str, list[int]] = {}
        for i, sample in enumerate(batch):
            groups.setdefault(sample.prompt_id, []).append(i)
        return [pair for group in groups.values() for pair in combinations(group, 2)]

    def _task(self, sample: Sample, a: str, b: str) -> str:
        return (
            f"{self.rubric}\n\n# Conversation\n\n{_conversation(sample)}\n\n# Answer A\n\n{a}\n\n# Answer B\n\n{b}\n\n"
            '# Your verdict\n\nWhich answer is better? As JSON: {"better": "A"}, {"better": "B"} or {"better": "tie"}'
        )


def _share_of_a(value: Any) -> float:
    shares: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}
    share = shares.get(str(value).strip().lower())
    if share is None:
        raise WrongAnswerError(f"the judge's verdict is {value!r}; expected A, B or tie")
    return share
