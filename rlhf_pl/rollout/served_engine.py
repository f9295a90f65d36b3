"""One running `vllm serve`, as the trainer talks to it over HTTP."""

from collections.abc import Callable
from typing import Any

from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.retries import RETRYABLE
from rlhf_pl.utils.secrets import environment_key, redact

LAUNCH = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "%s"}\''
_QUESTION_S = 60.0  # a server that answers at all says in this time what it is and what weights it has


class ServerError(InputError):
    """A server that gave no answer, or an error.

    Args:
        message: What happened.
        again: Whether another attempt may help.
        status: Of HTTP; None where there was no answer.
    """

    def __init__(self, message: str, again: bool, status: int | None = None) -> None:
        super().__init__(f"`rollout.sampler`: {message}")
        self.again, self.status = again, status


class ServedEngine:
    """A server, from here.

    Args:
        url: Of the server.
        timeout_s: Time limit of a request, seconds.
        api_key_env: Environment variable with its API key; None for none.
    """

    def __init__(self, url: str, timeout_s: float, api_key_env: str | None = None) -> None:
        self.url, self.timeout_s, self._api_key_env = url.rstrip("/"), timeout_s, api_key_env
        self.model = ""  # the name its model has
        self._http: Any = None

    def call(
        self, path: str, body: Any = None, get: bool = False, read: Callable[[Any], Any] = lambda answer: answer
    ) -> Any:
        """What the server answers.

        Args:
            path: Of the request.
            body: JSON.
            get: Whether it is a question, which has a limit of its own.
            read: Takes what is wanted out of the answer's JSON.

        Raises:
            ServerError: Nothing, an error, or what vLLM would not answer.
        """
        import httpx

        limit = min(_QUESTION_S, self.timeout_s) if get else self.timeout_s
        timeout = httpx.Timeout(limit, connect=min(10.0, limit))
        try:
            if get:
                response = self._client().get(self.url + path, timeout=timeout)
            else:
                response = self._client().post(self.url + path, json=body, timeout=timeout)
        except httpx.TimeoutException as error:
            raise ServerError(f"{self.url}{path} gave no answer within {limit:g} s.", again=True) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{self.url} can't be reached: {_said(error)}", again=True) from error
        if response.status_code != 200:
            said = redact(response.text)[:300].strip().replace("\n", " ")
            raise ServerError(
                f"{self.url}{path} answered with status {response.status_code}: {said}",
                again=response.status_code in RETRYABLE,
                status=response.status_code,
            )
        try:
            return read(response.json() if response.content else None)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = redact(response.text)[:100]
            message = f"{self.url}{path} answered with what vLLM does not: {said!r}."
            raise ServerError(message, again=True, status=200) from error

    def config(self, backend: str) -> dict[str, Any]:
        """The engine's settings.

        Args:
            backend: Of the weight transfer that is wanted, for the message.

        Raises:
            InputError: It gives none: it was started in another way.
        """
        try:
            return self.call("/server_info?config_format=json", get=True, read=lambda told: dict(told["vllm_config"]))
        except ServerError as error:
            if error.status is None:
                raise
            raise InputError(
                f"`rollout.sampler.urls`: the server at {self.url} does not take weights ({error.status} for "
                f"/server_info). Start it as {LAUNCH % backend}"
            ) from error

    def served(self) -> dict[str, Any]:
        """What it says of its model: `id`, and `max_model_len` where it knows."""
        return self.call("/v1/models", get=True, read=lambda told: {"id": None} | told["data"][0])

    def workers(self) -> int:
        """Processes that hold weights."""
        return self.call("/get_world_size", get=True, read=lambda told: int(told["world_size"]))

    def weight_version(self) -> str:
        """What it calls its weights: the version that came with the last push to this very process."""
        return self.call("/weight_info", get=True, read=lambda told: told["weight_version"])

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def _client(self) -> Any:
        if self._http is None:
            import httpx

            key = environment_key(self._api_key_env)
            headers = {"authorization": f"Bearer {key}"} if key else {}
            # the servers close idle connections, which a request would only find out when it is lost
            limits = httpx.Limits(max_keepalive_connections=0)
            self._http = httpx.Client(headers=headers, limits=limits)
        return self._http


def _said(error: Exception) -> str:
    return f"{str(error).rstrip('.') or type(error).__name__}."
