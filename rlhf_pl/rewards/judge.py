"""A language model as the judge, behind any OpenAI-compatible chat endpoint."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf_pl.rewards.base import Failure, RewardResult, Sample
from rlhf_pl.rewards.chat_judge import (
    RUBRIC,
    JudgeReward,
    ResponseFormat,
    format_conversation,
    format_response,
    read_verdict,
)
from rlhf_pl.rewards.remote import InvalidReplyError
from rlhf_pl.utils.errors import InputError


class JudgeScoreReward(JudgeReward):
    """A judge that scores each response; the reward is the score scaled to 0 to 1.

    Args:
        url: Base URL of the endpoint, for example `http://localhost:8000/v1`.
        model: Name of the judge's model at the endpoint.
        rubric: The criteria, or a .txt or .md file with them.
        lowest: Lowest score.
        highest: Highest score.
        response_format: `json_schema` has the server enforce the schema of a verdict; `text` reads the verdict from
            free text, for servers without that feature.
        max_tokens: Maximum length of a verdict, tokens.
        temperature: The judge's sampling temperature.
        concurrency: Maximum number of concurrent requests.
        timeout_s: Time limit of an attempt, seconds.
        retries: Further attempts after an error or an invalid verdict.
        backoff_s: Pause before the second attempt, seconds; doubled before each further attempt.
        api_key_env: Environment variable with a key that is sent as a bearer token; null for no key.
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
        super().__init__(
            url,
            model,
            rubric,
            response_format,
            max_tokens,
            temperature,
            concurrency,
            timeout_s,
            retries,
            backoff_s,
            api_key_env,
        )
        self.lowest, self.highest = lowest, highest

    def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
        schema = {
            "type": "object",
            "properties": {"score": {"type": "integer", "minimum": self.lowest, "maximum": self.highest}},
            "required": ["score"],
            "additionalProperties": False,
        }
        tasks = [self._task(sample) for sample in batch]
        scores = self.ask(tasks, schema, lambda body: self._scale(read_verdict(body, "score")))
        return [
            s if isinstance(s, Failure) else RewardResult(s, {"score": self.lowest + s * (self.highest - self.lowest)})
            for s in scores
        ]

    def _task(self, sample: Sample) -> str:
        return (
            f"{self.rubric}\n\n# Conversation\n\n{format_conversation(sample)}\n\n# The assistant's answer\n\n"
            f"{format_response(sample)}\n\n# Your verdict\n\n"
            f"A whole number from {self.lowest} (worst) to {self.highest} "
            '(best), as JSON: {"score": <number>}'
        )

    def _scale(self, value: Any) -> float:
        try:
            score = float(value)
        except (TypeError, ValueError):
            raise InvalidReplyError(f"the judge's score is {value!r}; expected a number") from None
        if not self.lowest <= score <= self.highest:
            raise InvalidReplyError(f"the judge's score is {score:g}; expected {self.lowest} to {self.highest}")
        return (score - self.lowest) / (self.highest - self.lowest)


class JudgePairReward(JudgeReward):
    """A judge that compares pairs of responses; the reward is a response's win rate, with ties as half a win.

    Each comparison is made in both orders, to cancel position bias. Without `reference_column`, all responses to a
    prompt are compared with each other: the mean reward of a prompt is then always one half, which ranks its responses
    but does not compare policies. With it, each response is compared with the row's reference answer.

    Args:
        url: Base URL of the endpoint, for example `http://localhost:8000/v1`.
        model: Name of the judge's model at the endpoint.
        rubric: The criteria, or a .txt or .md file with them.
        reference_column: Column with an answer to compare with; null to compare a prompt's responses with each other.
        response_format: `json_schema` has the server enforce the schema of a verdict; `text` reads the verdict from
            free text, for servers without that feature.
        max_tokens: Maximum length of a verdict, tokens.
        temperature: The judge's sampling temperature.
        concurrency: Maximum number of concurrent requests.
        timeout_s: Time limit of an attempt, seconds.
        retries: Further attempts after an error or an invalid verdict.
        backoff_s: Pause before the second attempt, seconds; doubled before each further attempt.
        api_key_env: Environment variable with a key that is sent as a bearer token; null for no key.
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
        super().__init__(
            url,
            model,
            rubric,
            response_format,
            max_tokens,
            temperature,
            concurrency,
            timeout_s,
            retries,
            backoff_s,
            api_key_env,
        )
        self.reference_column = reference_column

    @property
    def by_prompt(self) -> bool:
        return self.reference_column is None

    def check(self, samples: Sequence[Sample]) -> None:
        super().check(samples)
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
            texts = (
                format_response(batch[first]),
                self._reference(batch[first]) if second is None else format_response(batch[second]),
            )
            tasks += [self._task(batch[first], *texts), self._task(batch[first], *reversed(texts))]
        schema = {
            "type": "object",
            "properties": {"better": {"type": "string", "enum": ["A", "B", "tie"]}},
            "required": ["better"],
            "additionalProperties": False,
        }
        verdicts = self.ask(tasks, schema, lambda body: _read_share_of_a(read_verdict(body, "better")))
        wins: list[list[float]] = [[] for _ in batch]
        failed: dict[int, Failure] = {}
        for (first, second), forward, backward in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            for index in (first, *([] if second is None else [second])):
                for share_of_a in (forward, backward):
                    if isinstance(share_of_a, Failure):
                        failed[index] = share_of_a
            if isinstance(forward, Failure) or isinstance(backward, Failure):
                continue
            share = (forward + 1 - backward) / 2
            wins[first].append(share)
            if second is not None:
                wins[second].append(1 - share)
        alone = Failure(
            "exception",
            "there is no other response to this prompt to compare with; sample 2 or more, also for held-out prompts "
            "(val_num_responses), or set reference_column.",
            final=True,
        )
        return [
            failed.get(i) or (RewardResult(sum(shares) / len(shares)) if shares else alone)
            for i, shares in enumerate(wins)
        ]

    def _pairs(self, batch: Sequence[Sample]) -> list[tuple[int, int | None]]:
        """Indices of the responses to compare; None for the reference."""
        if self.reference_column is not None:
            return [(i, None) for i in range(len(batch))]
        groups: dict[str, list[int]] = {}
        for i, sample in enumerate(batch):
            groups.setdefault(sample.prompt_id, []).append(i)
        return [pair for group in groups.values() for pair in combinations(group, 2)]

    def _task(self, sample: Sample, a: str, b: str) -> str:
        return (
            f"{self.rubric}\n\n# Conversation\n\n{format_conversation(sample)}\n\n# Answer A\n\n{a}\n\n"
            f"# Answer B\n\n{b}\n\n"
            '# Your verdict\n\nWhich answer is better? As JSON: {"better": "A"}, {"better": "B"} or {"better": "tie"}'
        )


def _read_share_of_a(value: Any) -> float:
    shares: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}
    share = shares.get(str(value).strip().lower())
    if share is None:
        raise InvalidReplyError(f"the judge's verdict is {value!r}; expected A, B or tie")
    return share
