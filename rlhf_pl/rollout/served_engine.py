"""HTTP client of one running `vllm serve`."""

from collections.abc import Callable
from typing import Any

from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.retries import RETRYABLE
from rlhf_pl.utils.secrets import environment_key, redact

LAUNCH_COMMAND = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "%s"}\''
_QUERY_TIMEOUT_S = 60.0  # upper limit for requests for a server's settings or the version of its weights


class ServerError(InputError):
    """A server did not reply, or replied with an error.

    Args:
        message: What happened.
        is_retryable: Whether another attempt may succeed.
        status: HTTP status; None if there was no reply.
    """

    def __init__(self, message: str, is_retryable: bool, status: int | None = None) -> None:
        super().__init__(f"`rollout.sampler`: {message}")
        self.is_retryable, self.status = is_retryable, status


class ServedEngine:
    """Sends requests to one server.

    Args:
        url: URL of the server.
        timeout_s: Time limit of a request, seconds.
        api_key_env: Environment variable with the server's API key; None for none.
    """

    def __init__(self, url: str, timeout_s: float, api_key_env: str | None = None) -> None:
        self.url, self.timeout_s, self._api_key_env = url.rstrip("/"), timeout_s, api_key_env
        self.model = ""  # name of the served model
        self._http: Any = None

    def call(
        self, path: str, body: Any = None, get: bool = False, parse: Callable[[Any], Any] = lambda reply: reply
    ) -> Any:
        """Send a request and return the parsed reply.

        Args:
            path: Path of the request.
            body: JSON body of a POST request.
            get: Whether to send a GET request, which has a shorter time limit.
            parse: Extracts the result from the reply's JSON.

        Raises:
            ServerError: There was no reply, an error, or a reply that vLLM does not send.
        """
        import httpx

        limit = min(_QUERY_TIMEOUT_S, self.timeout_s) if get else self.timeout_s
        timeout = httpx.Timeout(limit, connect=min(10.0, limit))
        try:
            if get:
                response = self._client().get(self.url + path, timeout=timeout)
            else:
                response = self._client().post(self.url + path, json=body, timeout=timeout)
        except httpx.TimeoutException as error:
            raise ServerError(f"{self.url}{path} did not reply within {limit:g} s.", is_retryable=True) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{self.url} can't be reached: {_describe(error)}", is_retryable=True) from error
        if response.status_code != 200:
            detail = redact(response.text)[:300].strip().replace("\n", " ")
            raise ServerError(
                f"{self.url}{path} replied with status {response.status_code}: {detail}",
                is_retryable=response.status_code in RETRYABLE,
                status=response.status_code,
            )
        try:
            return parse(response.json() if response.content else None)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            message = f"{self.url}{path} sent a reply that is not vLLM's: {redact(response.text)[:100]!r}."
            raise ServerError(message, is_retryable=True, status=200) from error

    def get_config(self, backend: str) -> dict[str, Any]:
        """The engine's settings.

        Args:
            backend: Backend of the weight transfer that the server needs, for the message.

        Raises:
            InputError: The server does not report its settings, as it was started without weight transfer.
        """
        try:
            return self.call(
                "/server_info?config_format=json", get=True, parse=lambda reply: dict(reply["vllm_config"])
            )
        except ServerError as error:
            if error.status is None:
                raise
            raise InputError(
                f"`rollout.sampler.urls`: the server at {self.url} does not accept weights ({error.status} for "
                f"/server_info). Start it as {LAUNCH_COMMAND % backend}"
            ) from error

    def get_model_info(self) -> dict[str, Any]:
        """The served model's information: `id`, and `max_model_len` if known."""
        return self.call("/v1/models", get=True, parse=lambda reply: {"id": None} | reply["data"][0])

    def count_workers(self) -> int:
        """Number of processes that hold weights."""
        return self.call("/get_world_size", get=True, parse=lambda reply: int(reply["world_size"]))

    def get_weight_version(self) -> str:
        """The version of its weights, set by the last weight sync; a restart resets it."""
        return self.call("/weight_info", get=True, parse=lambda reply: reply["weight_version"])

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def _client(self) -> Any:
        if self._http is None:
            import httpx

            key = environment_key(self._api_key_env)
            headers = {"authorization": f"Bearer {key}"} if key else {}
            # the servers close idle connections, and a request on a closed connection would be lost
            limits = httpx.Limits(max_keepalive_connections=0)
            self._http = httpx.Client(headers=headers, limits=limits)
        return self._http


def _describe(error: Exception) -> str:
    return f"{str(error).rstrip('.') or type(error).__name__}."
