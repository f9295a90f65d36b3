"""A reward behind an HTTP endpoint of your own."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pl.rewards.base import Failure, RewardResult, Sample
from rlhf_pl.rewards.remote import RemoteReward, Service, WrongAnswerError, number
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redact


class HTTPReward(RemoteReward):
    """An endpoint that takes and gives JSON.

    It gets `{"samples": [{"prompt_id", "messages", "response", "finished", "columns"}, ...]}`, with `response_message`
    where an answer has tool calls and `tools` where a row has some. It answers with `{"rewards": [...]}`, one entry per
    sample in their order: a number, or `{"reward": number, "components": {name: number}}`, or null for an answer that
    it can't score. docs/rewards.md has the schema and a server in 20 lines.

    Args:
        url: Where requests are posted to.
        samples_per_request: Answers in one request.
        concurrency: Requests under way at a time.
        timeout_s: Time limit of an attempt, seconds, from connecting to the last byte.
        retries: Further attempts after a broken connection, an error of the server's, or a wrong answer.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        api_key_env: Environment variable with a key that is sent as a bearer token; null for none.
    """

    def __init__(
        self,
        url: str,
        samples_per_request: int = 16,
        concurrency: int = 8,
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        api_key_env: str | None = None,
    ) -> None:
        if samples_per_request < 1:
            raise InputError(f"`rollout.reward.samples_per_request` must be 1 or more, got {samples_per_request}.")
        self.url, self.samples_per_request = url, samples_per_request
        self._service = Service(url, timeout_s, retries, backoff_s, concurrency, api_key_env)
        self._alone = Service(url, timeout_s, 0, backoff_s, concurrency, api_key_env)

    @property
    def name(self) -> str:
        return redact(f"HTTPReward({self.url})")

    def fingerprint(self) -> str:
        return self.name

    def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
        size = self.samples_per_request
        found = self._request(self._service, [batch[i : i + size] for i in range(0, len(batch), size)])
        # a service may fail on a whole request because of one answer in it: that one alone should have no reward
        doubtful = [i for i, r in enumerate(found) if isinstance(r, Failure) and r.kind in ("exception", "timeout")]
        if size > 1 and doubtful and len(batch) > 1:
            alone = self._request(self._alone, [[batch[i]] for i in doubtful])
            for i, result in zip(doubtful, alone, strict=True):
                found[i] = result
        return found

    @staticmethod
    def _request(service: Service, groups: Sequence[Sequence[Sample]]) -> list[RewardResult | Failure]:
        payloads = [{"samples": [_as_json(sample) for sample in group]} for group in groups]
        answers = service.map(payloads, lambda i, body: _parse(body, len(groups[i])))
        results: list[RewardResult | Failure] = []
        for group, answer in zip(groups, answers, strict=True):
            results += [answer] * len(group) if isinstance(answer, Failure) else answer
        return results


def _as_json(sample: Sample) -> dict[str, Any]:
    more: dict[str, Any] = {} if sample.message is None else {"response_message": sample.message}
    if sample.tools:
        more["tools"] = list(sample.tools)
    return more | {
        "prompt_id": sample.prompt_id,
        "messages": sample.messages,
        "response": sample.response,
        "finished": sample.finished,
        "columns": dict(sample.columns),
    }


def _parse(body: Any, count: int) -> list[RewardResult | Failure]:
    rewards = body.get("rewards") if isinstance(body, Mapping) else None
    if not isinstance(rewards, list):
        raise WrongAnswerError('expected an object with a list under "rewards"')
    if len(rewards) != count:
        raise WrongAnswerError(f"{len(rewards)} rewards for {count} samples")
    return [_result(entry) for entry in rewards]


def _result(entry: Any) -> RewardResult | Failure:
    if entry is None:
        return Failure("refused", "the endpoint gave null for this answer.", True)
    if not isinstance(entry, Mapping):
        return RewardResult(number(entry, "a reward"))
    components = entry.get("components") or {}
    if not isinstance(components, Mapping):
        raise WrongAnswerError('"components" is no object')
    parts = {str(name): number(value, f"component {name!r}") for name, value in components.items()}
    return RewardResult(number(entry.get("reward"), "`reward`"), parts)
