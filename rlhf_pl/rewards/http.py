"""A reward that a user's HTTP endpoint computes."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_pl.rewards.base import Failure, RewardResult, Sample
from rlhf_pl.rewards.remote import InvalidReplyError, RemoteReward, Service, parse_number
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.secrets import redact


class HTTPReward(RemoteReward):
    """An endpoint that receives and returns JSON.

    It receives `{"samples": [{"prompt_id", "messages", "response", "finished", "columns"}, ...]}`, with
    `response_message` if a response has tool calls and `tools` if a row has tools. It replies with
    `{"rewards": [...]}`, one entry per sample, in order: a number, or
    `{"reward": number, "components": {name: number}}`, or null for a response that it can't score. docs/rewards.md has
    the schema and a server in 20 lines.

    Args:
        url: URL for POST requests.
        samples_per_request: Responses per request.
        concurrency: Maximum number of concurrent requests.
        timeout_s: Time limit of an attempt, seconds, from connecting to the last byte of the reply.
        retries: Further attempts after a broken connection, a server error, or an invalid reply.
        backoff_s: Pause before the second attempt, seconds; doubled before each further attempt.
        api_key_env: Environment variable with a key that is sent as a bearer token; null for no key.
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
        self._single_service = Service(url, timeout_s, 0, backoff_s, concurrency, api_key_env)

    @property
    def name(self) -> str:
        return redact(f"HTTPReward({self.url})")

    def fingerprint(self) -> str:
        return self.name

    def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
        size = self.samples_per_request
        results = self._request(self._service, [batch[i : i + size] for i in range(0, len(batch), size)])
        # one response may make a whole request fail: retry each alone, so that only that one has no reward
        failed = [i for i, r in enumerate(results) if isinstance(r, Failure) and r.kind in ("exception", "timeout")]
        if size > 1 and failed and len(batch) > 1:
            retried = self._request(self._single_service, [[batch[i]] for i in failed])
            for i, result in zip(failed, retried, strict=True):
                results[i] = result
        return results

    @staticmethod
    def _request(service: Service, groups: Sequence[Sequence[Sample]]) -> list[RewardResult | Failure]:
        payloads = [{"samples": [_to_json(sample) for sample in group]} for group in groups]
        replies = service.map(payloads, lambda i, body: _parse_reply(body, len(groups[i])))
        results: list[RewardResult | Failure] = []
        for group, reply in zip(groups, replies, strict=True):
            results += [reply] * len(group) if isinstance(reply, Failure) else reply
        return results


def _to_json(sample: Sample) -> dict[str, Any]:
    optional: dict[str, Any] = {} if sample.message is None else {"response_message": sample.message}
    if sample.tools:
        optional["tools"] = list(sample.tools)
    return optional | {
        "prompt_id": sample.prompt_id,
        "messages": sample.messages,
        "response": sample.response,
        "finished": sample.finished,
        "columns": dict(sample.columns),
    }


def _parse_reply(body: Any, count: int) -> list[RewardResult | Failure]:
    rewards = body.get("rewards") if isinstance(body, Mapping) else None
    if not isinstance(rewards, list):
        raise InvalidReplyError('expected an object with a list under "rewards"')
    if len(rewards) != count:
        raise InvalidReplyError(f"{len(rewards)} rewards for {count} samples")
    return [_parse_entry(entry) for entry in rewards]


def _parse_entry(entry: Any) -> RewardResult | Failure:
    if entry is None:
        return Failure("refused", "the endpoint returned null for this response.", True)
    if not isinstance(entry, Mapping):
        return RewardResult(parse_number(entry, "a reward"))
    components = entry.get("components") or {}
    if not isinstance(components, Mapping):
        raise InvalidReplyError('"components" is not an object')
    parts = {str(name): parse_number(value, f"component {name!r}") for name, value in components.items()}
    return RewardResult(parse_number(entry.get("reward"), "`reward`"), parts)
