"""The base class of judges behind a chat endpoint: requests, and reading of verdicts."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf_pl.models.chat import plain_text
from rlhf_pl.rewards.base import Failure, Sample
from rlhf_pl.rewards.remote import InvalidReplyError, RemoteReward, Service
from rlhf_pl.utils.errors import InputError, check_at_least
from rlhf_pl.utils.secrets import redact

T = TypeVar("T")
RUBRIC = (
    "Judge how well the assistant's answer serves the user: is it correct, does it do what was asked, is it clear and "
    "no longer than it needs to be?"
)
ResponseFormat = Literal["json_schema", "text"]


class JudgeReward(RemoteReward):
    """A language model as the judge. A subclass writes the tasks and turns verdicts into rewards.

    Args:
        url: Base URL of the endpoint.
        model: Name of the judge's model at the endpoint.
        rubric: The criteria, or a .txt or .md file with them.
        response_format: `json_schema` has the server enforce the schema of a verdict.
        max_tokens: Maximum length of a verdict, tokens.
        temperature: The judge's sampling temperature.
        concurrency: Maximum number of concurrent requests.
        timeout_s: Time limit of an attempt, seconds.
        retries: Further attempts after an error or an invalid verdict.
        backoff_s: Pause before the second attempt, seconds; doubled before each further attempt.
        api_key_env: Environment variable with a key that is sent as a bearer token; None for no key.
    """

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str,
        response_format: ResponseFormat,
        max_tokens: int,
        temperature: float,
        concurrency: int,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        api_key_env: str | None,
    ) -> None:
        self._service = Service(_chat_url(url), timeout_s, retries, backoff_s, concurrency, api_key_env)
        check_at_least("rollout.reward", max_tokens=(max_tokens, 1), temperature=(temperature, 0))
        # public attributes with plain values are part of the fingerprint
        self.url, self.model, self.rubric, self.temperature = url, model, _read_rubric(rubric), temperature
        self._response_format, self._max_tokens = response_format, max_tokens

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.model})"

    def ask(self, tasks: Sequence[str], schema: dict[str, Any], read: Callable[[Any], T]) -> list[T | Failure]:
        """Send each task to the judge, and return what `read` returns for each reply, or why there is none.

        Args:
            tasks: Texts for the judge.
            schema: JSON schema of a verdict.
            read: Reads the JSON body of a reply; raises InvalidReplyError for an invalid one.
        """
        return self._service.map([self._request(task, schema) for task in tasks], lambda _, body: read(body))

    def _request(self, task: str, schema: dict[str, Any]) -> dict[str, Any]:
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": task}],
            "max_tokens": self._max_tokens,
            "temperature": self.temperature,
        }
        if self._response_format == "json_schema":
            json_schema = {"name": "verdict", "strict": True, "schema": schema}
            payload["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return payload


def _read_rubric(rubric: str) -> str:
    """`rubric`, or the content of the file that it names."""
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


def format_conversation(sample: Sample) -> str:
    """The messages before the response as text for the judge."""
    return "\n\n".join(f"[{m['role']}]\n{plain_text(m)}" for m in sample.messages)


def format_response(sample: Sample) -> str:
    """The response as text for the judge."""
    return plain_text(sample.response_message)


def _reply_text(body: Any) -> str:
    try:
        content = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise InvalidReplyError("expected a chat completion with choices[0].message.content") from None
    if not isinstance(content, str) or not content.strip():
        raise InvalidReplyError("the judge's reply is empty; raise `max_tokens` if it thinks before it replies")
    return content


def read_verdict(body: Any, key: str) -> Any:
    """The value of `key` in a reply, from the last JSON object that has it, or from a line like `score: 7`.

    Raises:
        InvalidReplyError: The reply has no such value.
    """
    text = _reply_text(body)
    for found in reversed(re.findall(r"\{[^{}]*\}", text)):
        try:
            value = json.loads(found)
        except ValueError:
            continue
        if key in value:
            return value[key]
    if lines := re.findall(rf"(?i)\b{key}\b\W{{1,5}}(-?\d+(?:\.\d+)?|\w+)", text):
        return lines[-1]
    raise InvalidReplyError(f'the reply of the judge has no "{key}": {redact(text)[-120:]!r}')
