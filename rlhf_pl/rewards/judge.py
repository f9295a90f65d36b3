"""A language model as the judge, behind any OpenAI-compatible chat endpoint."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rlhf_pl.rewards.base import Failure, RewardResult, Sample
from rlhf_pl.rewards.chat_judge import RUBRIC, JudgeReward, ResponseFormat, conversation, response, verdict
from rlhf_pl.rewards.remote import WrongAnswerError
from rlhf_pl.utils.errors import InputError


class JudgeScoreReward(JudgeReward):
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
        scores = self.ask(tasks, schema, lambda body: self._scaled(verdict(body, "score")))
        return [
            s if isinstance(s, Failure) else RewardResult(s, {"score": self.lowest + s * (self.highest - self.lowest)})
            for s in scores
        ]

    def _task(self, sample: Sample) -> str:
        return (
            f"{self.rubric}\n\n# Conversation\n\n{conversation(sample)}\n\n# The assistant's answer\n\n"
            f"{response(sample)}\n\n# Your verdict\n\nA whole number from {self.lowest} (worst) to {self.highest} "
            '(best), as JSON: {"score": <number>}'
        )

    def _scaled(self, value: Any) -> float:
        try:
            score = float(value)
        except (TypeError, ValueError):
            raise WrongAnswerError(f"the judge's score is {value!r}; expected a number") from None
        if not self.lowest <= score <= self.highest:
            raise WrongAnswerError(f"the judge's score is {score:g}; expected {self.lowest} to {self.highest}")
        return (score - self.lowest) / (self.highest - self.lowest)


class JudgePairReward(JudgeReward):
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
            answers = (
                response(batch[first]),
                self._reference(batch[first]) if second is None else response(batch[second]),
            )
            tasks += [self._task(batch[first], *answers), self._task(batch[first], *reversed(answers))]
        schema = {
            "type": "object",
            "properties": {"better": {"type": "string", "enum": ["A", "B", "tie"]}},
            "required": ["better"],
            "additionalProperties": False,
        }
        verdicts = self.ask(tasks, schema, lambda body: _share_of_a(verdict(body, "better")))
        won: list[list[float]] = [[] for _ in batch]
        failed: dict[int, Failure] = {}
        for (first, second), there, back in zip(pairs, verdicts[::2], verdicts[1::2], strict=True):
            for index in (first, *([] if second is None else [second])):
                for share_of_a in (there, back):
                    if isinstance(share_of_a, Failure):
                        failed[index] = share_of_a
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
            f"{self.rubric}\n\n# Conversation\n\n{conversation(sample)}\n\n# Answer A\n\n{a}\n\n# Answer B\n\n{b}\n\n"
            '# Your verdict\n\nWhich answer is better? As JSON: {"better": "A"}, {"better": "B"} or {"better": "tie"}'
        )


def _share_of_a(value: Any) -> float:
    shares: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}
    share = shares.get(str(value).strip().lower())
    if share is None:
        raise WrongAnswerError(f"the judge's verdict is {value!r}; expected A, B or tie")
    return share
