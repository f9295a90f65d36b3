"""JSON over HTTP to a service that scores: many requests at once, each with a time limit and retries."""

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rlhf_pl.rewards.base import Failure, Reward, Sample
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.retries import RETRYABLE, check_requests, retry_after
from rlhf_pl.utils.secrets import check_environment_key, environment_key, redact, register_url

T = TypeVar("T")
MAX_BODY_BYTES = 64 * 2**20
_MAX_SAID_BYTES = 2**16  # of an answer that is quoted in an error


class WrongAnswerError(Exception):
    """The service answered something else than was agreed on."""


class Service:
    """A URL that takes and gives JSON.

    Args:
        url: Where requests are posted to.
        timeout_s: Time limit of an attempt, seconds, from connecting to the last byte.
        retries: Further attempts after a failure.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        concurrency: Requests under way at a time.
        api_key_env: Environment variable with a key that is sent as a bearer token; None for none.
        option: The option that holds the URL, for errors.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        concurrency: int,
        api_key_env: str | None,
        option: str = "rollout.reward.url",
    ) -> None:
        register_url(url)
        if not url.startswith(("http://", "https://")):
            raise InputError(f"`{option}` must begin with http:// or https://, got {url!r}.")
        self._retries = check_requests("rollout.reward", concurrency, timeout_s, retries, backoff_s)
        self.url, self.timeout_s, self.concurrency, self.api_key_env = url, timeout_s, concurrency, api_key_env

    def check(self) -> None:
        """Raise InputError if the key is not in the environment."""
        check_environment_key("rollout.reward.api_key_env", self.api_key_env)

    def map(self, payloads: Sequence[Mapping[str, Any]], parse: Callable[[int, Any], T]) -> list[T | Failure]:
        """What `parse(number of the payload, JSON body)` makes of the service's answers, in order.

        `parse` raises WrongAnswerError for a body that is not as agreed, which is tried again like a server's error.
        """
        if not payloads:
            return []
        return _run(self._map(payloads, parse))

    def get(self, url: str) -> Any:
        """The JSON that the service has at `url`; None if it gives none."""
        import httpx

        try:
            return httpx.get(url, headers=self._headers(), timeout=self.timeout_s).raise_for_status().json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return None

    def _headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if key := environment_key(self.api_key_env):
            headers["authorization"] = f"Bearer {key}"
        return headers

    async def _map(self, payloads: Sequence[Mapping[str, Any]], parse: Callable[[int, Any], T]) -> list[T | Failure]:
        import httpx

        gate = asyncio.Semaphore(self.concurrency)
        limits = httpx.Limits(max_connections=self.concurrency)
        async with httpx.AsyncClient(timeout=None, limits=limits, headers=self._headers()) as client:

            async def one(number: int) -> T | Failure:
                async with gate:
                    return await self._post(client, payloads[number], lambda body: parse(number, body))

            return list(await asyncio.gather(*(one(i) for i in range(len(payloads)))))

    async def _post(self, client: Any, payload: Mapping[str, Any], parse: Callable[[Any], T]) -> T | Failure:
        failures = 0
        while True:
            found, again, asked_s = await self._attempt(client, payload, parse)
            if not isinstance(found, Failure):
                return found
            failures += 1
            pause = self._retries.pause(failures, asked_s) if again else None
            if pause is None:
                times = f" ({failures} attempts)" if failures > 1 else ""
                return Failure(found.kind, f"{found.detail}{times}.", True)
            await asyncio.sleep(pause)

    async def _attempt(
        self, client: Any, payload: Mapping[str, Any], parse: Callable[[Any], T]
    ) -> tuple[T | Failure, bool, float]:
        """(what came of it, whether another attempt may help, how long the service asks to wait, seconds)."""
        import httpx

        try:
            async with asyncio.timeout(self.timeout_s):
                status, headers, body = await self._exchange(client, payload)
        except TimeoutError:
            return Failure("timeout", f"{self.url} gave no whole answer within {self.timeout_s:g} s"), True, 0.0
        except httpx.ConnectError as error:
            return Failure("unreachable", f"{self.url} can't be reached: {error or type(error).__name__}"), True, 0.0
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            reason = str(error) or type(error).__name__
            return Failure("exception", f"the connection to {self.url} broke: {reason}"), True, 0.0
        except WrongAnswerError as error:
            return Failure("exception", f"{self.url}: {error}"), False, 0.0
        if not 200 <= status < 300:
            said = _said(body)[:200].strip().replace("\n", " ")
            failure = Failure("exception", f"{self.url} answered with status {status}: {said}")
            return failure, status in RETRYABLE, retry_after(headers)
        try:
            return parse(json.loads(body)), False, 0.0
        except (ValueError, RecursionError):
            said = _said(body)[:80]
            return Failure("exception", f"{self.url} gave no JSON: {said!r}"), True, 0.0
        except WrongAnswerError as error:
            return Failure("exception", f"{self.url}: {error}"), True, 0.0

    async def _exchange(self, client: Any, payload: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        content = json.dumps(payload, ensure_ascii=False, default=str).encode("utf-8", "replace")
        async with client.stream("POST", self.url, content=content) as response:
            body = bytearray()
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise WrongAnswerError(f"the answer is longer than {MAX_BODY_BYTES // 2**20} MiB")
            return response.status_code, response.headers, bytes(body)


class RemoteReward(Reward):
    """A reward that a service computes: it is tried before any model loads, and `Service` limits every call."""

    _service: Service

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
        self._service.check()


def _said(body: bytes) -> str:
    """The beginning of what a service answered; a secret in it is found before it is cut."""
    return redact(body[:_MAX_SAID_BYTES].decode(errors="replace"))


def _run(coroutine: Any) -> Any:
    """Run to the end, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(coroutine)))
    thread.start()
    thread.join()
    return found[0]


def number(value: Any, what: str) -> float:
    """A JSON number; NaN and infinities pass, for the caller to refuse by name.

    Raises:
        WrongAnswerError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise WrongAnswerError(f"{what} is {value!r}; expected a number")
    return float(value)
