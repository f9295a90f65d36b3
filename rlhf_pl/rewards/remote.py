"""JSON over HTTP to a scoring service: concurrent requests, each with a time limit and retries."""

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
_MAX_QUOTED_BYTES = 2**16  # of a reply that an error quotes


class InvalidReplyError(Exception):
    """The service's reply does not have the expected form."""


class Service:
    """A URL that receives and returns JSON.

    Args:
        url: URL for POST requests.
        timeout_s: Time limit of an attempt, seconds, from connecting to the last byte of the reply.
        retries: Further attempts after a failure.
        backoff_s: Pause before the second attempt, seconds; doubled before each further attempt.
        concurrency: Maximum number of concurrent requests.
        api_key_env: Environment variable with a key that is sent as a bearer token; None for no key.
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
        """Post each payload, and return what `parse(index of the payload, JSON body)` returns for its reply, in order.

        `parse` raises InvalidReplyError for an invalid body; the request is then retried, as after a server error.
        """
        if not payloads:
            return []
        return _run_coroutine(self._map(payloads, parse))

    def get_json(self, url: str) -> Any:
        """The JSON at `url`; None if there is none."""
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

        semaphore = asyncio.Semaphore(self.concurrency)
        limits = httpx.Limits(max_connections=self.concurrency)
        async with httpx.AsyncClient(timeout=None, limits=limits, headers=self._headers()) as client:

            async def post(index: int) -> T | Failure:
                async with semaphore:
                    return await self._post(client, payloads[index], lambda body: parse(index, body))

            return list(await asyncio.gather(*(post(i) for i in range(len(payloads)))))

    async def _post(self, client: Any, payload: Mapping[str, Any], parse: Callable[[Any], T]) -> T | Failure:
        failures = 0
        while True:
            found, is_retryable, retry_after_s = await self._attempt(client, payload, parse)
            if not isinstance(found, Failure):
                return found
            failures += 1
            pause = self._retries.pause(failures, retry_after_s) if is_retryable else None
            if pause is None:
                attempts = f" ({failures} attempts)" if failures > 1 else ""
                return Failure(found.kind, f"{found.detail}{attempts}.", True)
            await asyncio.sleep(pause)

    async def _attempt(
        self, client: Any, payload: Mapping[str, Any], parse: Callable[[Any], T]
    ) -> tuple[T | Failure, bool, float]:
        """Post once: (result, whether it can be retried, the seconds that the service asks to wait before that)."""
        import httpx

        try:
            async with asyncio.timeout(self.timeout_s):
                status, headers, body = await self._exchange(client, payload)
        except TimeoutError:
            return Failure("timeout", f"{self.url} did not complete its reply within {self.timeout_s:g} s"), True, 0.0
        except httpx.ConnectError as error:
            return Failure("unreachable", f"{self.url} can't be reached: {error or type(error).__name__}"), True, 0.0
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            reason = str(error) or type(error).__name__
            return Failure("exception", f"the connection to {self.url} broke: {reason}"), True, 0.0
        except InvalidReplyError as error:
            return Failure("exception", f"{self.url}: {error}"), False, 0.0
        if not 200 <= status < 300:
            quote = _decode_body(body)[:200].strip().replace("\n", " ")
            failure = Failure("exception", f"{self.url} replied with status {status}: {quote}")
            return failure, status in RETRYABLE, retry_after(headers)
        try:
            return parse(json.loads(body)), False, 0.0
        except (ValueError, RecursionError):
            quote = _decode_body(body)[:80]
            return Failure("exception", f"{self.url} returned no JSON: {quote!r}"), True, 0.0
        except InvalidReplyError as error:
            return Failure("exception", f"{self.url}: {error}"), True, 0.0

    async def _exchange(self, client: Any, payload: Mapping[str, Any]) -> tuple[int, Mapping[str, str], bytes]:
        content = json.dumps(payload, ensure_ascii=False, default=str).encode("utf-8", "replace")
        async with client.stream("POST", self.url, content=content) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise InvalidReplyError(f"the reply is longer than {MAX_BODY_BYTES // 2**20} MiB")
            return response.status_code, response.headers, bytes(body)


class RemoteReward(Reward):
    """A reward that a service computes. It is tried before any model loads; `Service` limits the time of a request."""

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


def _decode_body(body: bytes) -> str:
    """The beginning of a reply. Secrets are removed here, before callers truncate it further."""
    return redact(body[:_MAX_QUOTED_BYTES].decode(errors="replace"))


def _run_coroutine(coroutine: Any) -> Any:
    """Run a coroutine to completion, even if an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(coroutine)))
    thread.start()
    thread.join()
    return results[0]


def parse_number(value: Any, what: str) -> float:
    """Read a JSON number. NaN and infinities pass; the caller rejects them.

    Raises:
        InvalidReplyError: It is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidReplyError(f"{what} is {value!r}; expected a number")
    return float(value)
