"""What judges behind a chat endpoint share: how they are asked, and how their verdicts are read."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf_pl.models.chat import plain_text
from rlhf_pl.rewards.base import Failure, Sample
from rlhf_pl.rewards.remote import RemoteReward, Service, WrongAnswerError
from rlhf_pl.utils.errors import InputError, at_least
from rlhf_pl.utils.secrets import redact

T = TypeVar("T")
RUBRIC = (
    "Judge how well the assistant's answer serves the user: is it correct, does it do what was asked, is it clear and "
    "no longer than it needs to be?"
)
ResponseFormat = Literal["json_schema", "text"]


class JudgeReward(RemoteReward):
    """A language model as the judge. A subclass says what it is asked, and what its verdicts are worth.

    Args:
        url: Base URL of the endpoint.
        model: Name of the judging model there.
        rubric: What to judge by, or a .txt or .md file with it.
        response_format: `json_schema` has the server hold the judge to the form of a verdict.
        max_tokens: Longest verdict, tokens.
        temperature: Of the judge.
        concurrency: Requests under way at a time.
        timeout_s: Time limit of an attempt, seconds.
        retries: Further attempts after an error or a verdict that can't be read.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        api_key_env: Environment variable with a key that is sent as a bearer token; None for none.
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
        at_least("rollout.reward", max_tokens=(max_tokens, 1), temperature=(temperature, 0))
        # what is public and plain here is in the fingerprint
        self.url, self.model, self.rubric, self.temperature = url, model, _text_or_file(rubric), temperature
        self._response_format, self._max_tokens = response_format, max_tokens

    @property
    def name(self) -> str:
        return f"{type(self).__name__}({self.model})"

    def ask(self, tasks: Sequence[str], schema: dict[str, Any], read: Callable[[Any], T]) -> list[T | Failure]:
        """What `read` makes of the judge's answer to each task; it raises WrongAnswerError for what it can't read.

        Args:
            tasks: What the judge is told.
            schema: JSON schema of a verdict.
            read: Takes the body of an answer.
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
            form = {"name": "verdict", "strict": True, "schema": schema}
            payload["response_format"] = {"type": "json_schema", "json_schema": form}
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


def conversation(sample: Sample) -> str:
    """What a judge reads of the messages before the response."""
    return "\n\n".join(f"[{m['role']}]\n{plain_text(m)}" for m in sample.messages)


def response(sample: Sample) -> str:
    """What a judge reads of the response."""
    return plain_text(sample.response_message)


def _said(body: Any) -> str:
    try:
        content = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise WrongAnswerError("expected a chat completion with choices[0].message.content") from None
    if not isinstance(content, str) or not content.strip():
        raise WrongAnswerError("the judge said nothing; raise `max_tokens` if it thinks before it answers")
    return content


def verdict(body: Any, key: str) -> Any:
    """What the judge put under `key`: the last JSON object with it, or a line such as `score: 7`.

    Raises:
        WrongAnswerError: There is nothing under it.
    """
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
