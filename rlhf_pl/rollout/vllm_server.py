"""vLLM servers elsewhere, on other GPUs or nodes: answers over HTTP, weights by vLLM's weight transfer."""

import math
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlhf_pl.addresses import resolve
from rlhf_pl.errors import InputError, at_least
from rlhf_pl.rollout.base import EngineSpec, NamedTensors, PromptTokens, Response, Sampler, SamplingConfig
from rlhf_pl.rollout.checkpoint_format import checkpoint_format
from rlhf_pl.rollout.push import NCCLPush, Push, TCPPush
from rlhf_pl.rollout.self_check import StaleSamplerError
from rlhf_pl.rollout.vllm import check_engine_rotary, reshaping
from rlhf_pl.rotary import thresholds

BUCKET_BYTES = 256 * 2**20  # of weights under way at a time
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LAUNCH = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "%s"}\''


class VLLMServerSampler(Sampler):
    """Draws answers with running `vllm serve` processes. The policy's weights are pushed to them after every round.

    The servers are started by you (docs/scaling.md), with any parallelism, and serve this run alone:
    `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "rlhf_pl"}'`.

    Args:
        urls: The servers, such as `[http://node7:8000]`; prompts are dealt out to them.
        dtype: What the servers compute in (their `--dtype`); weights are sent in it.
        transport: `tcp` for servers started with backend rlhf_pl, which need this package beside vLLM; `nccl` for GPUs
            that NCCL connects, with vLLM's own backend of that name.
        address: Of rank 0's host, where the servers reach it; null for its address towards the first server. Rank 0
            listens there alone, while they connect, and lets nobody in who was not given the run's token.
        concurrency: Prompts under way at a time, per server and rank.
        timeout_s: Time limit of a request, seconds: of a prompt's answers, of a part of the weights on every
            connection, or for the servers' workers to connect.
        retries: Further attempts for a prompt after a failure.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        api_key_env: Environment variable with the servers' API key; null for none.
    """

    def __init__(
        self,
        urls: list[str],
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        transport: Literal["tcp", "nccl"] = "tcp",
        address: str | None = None,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        api_key_env: str | None = None,
    ) -> None:
        wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
        if wrong or not urls:
            raise InputError(
                "`rollout.sampler.urls` must be a list of addresses that begin with http:// or https://, got "
                f"{wrong[0] if wrong else urls!r}."
            )
        at_least("rollout.sampler", concurrency=(concurrency, 1), retries=(retries, 0), backoff_s=(backoff_s, 0))
        if not timeout_s > 0:
            raise InputError(f"`rollout.sampler.timeout_s` must be above 0 seconds, got {timeout_s}.")
        self.urls, self.dtype, self.transport, self.address = [u.rstrip("/") for u in urls], dtype, transport, address
        self.concurrency, self.timeout_s, self.retries, self.backoff_s = concurrency, timeout_s, retries, backoff_s
        self.api_key_env = api_key_env
        self._http: Any = None
        self._push: Push | None = None
        self._announced: set[str] = set()
        self._rank = 0
        self._version: str | None = None  # what the servers call the weights they were last given

    def check(self) -> None:
        """All servers must be there, with what is needed turned on."""
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise InputError(f"`rollout.sampler.api_key_env`: the environment variable {self.api_key_env} is not set.")
        for url in self.urls:
            config = self._server_config(url)
            backend = (config.get("weight_transfer_config") or {}).get("backend")
            wanted = _PUSHES[self.transport].backend
            if backend != wanted:
                raise InputError(
                    f"`rollout.sampler.urls`: the server at {url} takes weights by backend {backend!r}, but transport "
                    f"{self.transport} needs {wanted!r}. Start it as {_LAUNCH % wanted}"
                )
            dtype = str(config.get("model_config", {}).get("dtype", "")).removeprefix("torch.")
            if dtype and dtype != self.dtype:
                raise InputError(
                    f"`rollout.sampler.dtype` is {self.dtype}, but the server at {url} computes in {dtype}. Set it to "
                    f"{dtype}, or start the server with --dtype {self.dtype}."
                )
            if (
                str(config.get("device_config", {}).get("device_type")) == "cpu"
                and config.get("scheduler_config", {}).get("enable_chunked_prefill") is True
            ):
                raise InputError(
                    f"`rollout.sampler.urls`: the server at {url} runs on a CPU with chunked prefill, where vLLM can't "
                    "draw with a seed. Start it with --no-enable-chunked-prefill."
                )

    def check_rotary(self, config: Any, longest: int) -> None:
        for url in self.urls if thresholds(config) else ():
            served = self._call(url, "/v1/models", get=True)["data"][0].get("max_model_len") or longest
            check_engine_rotary(config, longest, served, f"`rollout.sampler.urls`: --max-model-len of {url}")

    def reshapes(self) -> list[str]:
        """A server's own defaults don't count: a request names every option of sampling."""
        found = []
        for url in self.urls:
            engine = self._server_config(url).get("model_config", {})
            names = [name for name in reshaping(engine) if name != "override_generation_config"]
            found += [f"the server at {url} runs with {name} {engine[name]!r}" for name in names]
        return found

    def start(self, spec: EngineSpec) -> None:
        self._rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._eos = list(spec.source.eos_token_ids)
        self._as_stored = checkpoint_format(spec.source)
        self._models = {url: self._served_model(url, spec.max_model_tokens) for url in self.urls}
        if self._rank == 0:
            self._connect()

    def forget(self, tensors: Mapping[str, Tensor]) -> None:
        """Notes what has to come; until it has, no answers are drawn."""
        self._announced, self._version = set(tensors), None

    def load_weights(self, tensors: NamedTensors) -> None:
        names: set[str] = set()
        bucket: list[tuple[str, Tensor]] = []
        if self._rank == 0:
            self._open_update()

        def cast() -> NamedTensors:
            for name, tensor in tensors:  # the stream is put together by all ranks, rank 0 sends it
                names.add(name)
                if self._rank == 0:
                    yield name, tensor.detach().to(getattr(torch, self.dtype))

        for name, tensor in self._as_stored(cast()):
            bucket.append((name, tensor))
            if sum(t.numel() * t.element_size() for _, t in bucket) >= BUCKET_BYTES:
                self._send(bucket)
                bucket = []
        if missing := self._announced - names:
            raise StaleSamplerError(
                f"The sampler was not given all weights of the policy: {', '.join(sorted(missing)[:3])} missing."
            )
        if self._rank == 0:
            if bucket:
                self._send(bucket)
            self._version = secrets.token_hex(8)
            self._all("/finish_weight_update", {"weight_version": self._version})
            self._all("/reset_prefix_cache")
            self._all("/resume")

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Requests of all ranks meet in the servers; a failed one is sent again, with the same seed."""
        self._check_versions()
        answered: queue.Queue[tuple[int, list[Response] | Exception]] = queue.Queue()
        stop = threading.Event()

        def ask(index: int, url: str) -> None:
            if stop.is_set():
                return
            try:
                answered.put((index, self._answers(url, prompts[index], sampling)))
            except Exception as error:
                answered.put((index, error))

        pools = [ThreadPoolExecutor(self.concurrency) for _ in self.urls]
        try:
            for index in range(len(prompts)):
                server = (index + self._rank) % len(self.urls)
                pools[server].submit(ask, index, self.urls[server])
            for _ in prompts:
                index, found = answered.get()
                if isinstance(found, Exception):
                    raise found
                yield index, found
        finally:
            stop.set()
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        if self._push is not None:
            self._push.close()
            self._push = None
        if self._http is not None:
            self._http.close()
            self._http = None

    def _client(self) -> Any:
        if self._http is None:
            import httpx

            key = os.environ.get(self.api_key_env or "", "")
            headers = {"authorization": f"Bearer {key}"} if key else {}
            # the servers close idle connections, which a request would only find out when it is lost
            limits = httpx.Limits(max_keepalive_connections=0)
            self._http = httpx.Client(
                timeout=httpx.Timeout(self.timeout_s, connect=10.0), headers=headers, limits=limits
            )
        return self._http

    def _call(self, url: str, path: str, body: Any = None, get: bool = False) -> Any:
        """What a server answers.

        Raises:
            InputError: Nothing, or an error.
        """
        import httpx

        try:
            response = self._client().get(url + path) if get else self._client().post(url + path, json=body)
        except httpx.TimeoutException as error:
            raise _ServerError(f"{url}{path} gave no answer within {self.timeout_s:g} s.", again=True) from error
        except httpx.HTTPError as error:
            raise _ServerError(f"{url} can't be reached: {error or type(error).__name__}.", again=True) from error
        if response.status_code != 200:
            said = response.text[:300].strip().replace("\n", " ")
            raise _ServerError(
                f"{url}{path} answered with status {response.status_code}: {said}",
                again=response.status_code in _AGAIN,
                status=response.status_code,
            )
        return response.json() if response.content else None

    def _all(self, path: str, body: Any = None) -> None:
        """The same call to every server, at once."""
        with ThreadPoolExecutor(len(self.urls)) as pool:
            list(pool.map(lambda url: self._call(url, path, body), self.urls))

    def _server_config(self, url: str) -> dict[str, Any]:
        try:
            return self._call(url, "/server_info?config_format=json", get=True)["vllm_config"]
        except _ServerError as error:
            if error.status is None:
                raise
            raise InputError(
                f"`rollout.sampler.urls`: the server at {url} does not take weights ({error.status} for /server_info). "
                f"Start it as {_LAUNCH % _PUSHES[self.transport].backend}"
            ) from error

    def _served_model(self, url: str, longest: int) -> str:
        """The name a server's model has."""
        model = self._call(url, "/v1/models", get=True)["data"][0]
        room = model.get("max_model_len") or math.inf
        if room < longest:
            raise InputError(
                f"`rollout.sampler.urls`: the server at {url} has room for {room} tokens, but prompt plus answer take "
                f"up to {longest}. Start it with --max-model-len {longest}, or lower data.max_prompt_tokens or "
                "rollout.sampling.max_response_tokens."
            )
        return model["id"]

    def _connect(self) -> None:
        address = self.address or _own_address(self.urls[0])
        try:
            push = self._push = _PUSHES[self.transport](address, self.timeout_s)
        except OSError as error:
            raise InputError(
                f"`rollout.sampler.address`: can't listen at {address}: {error.strerror or error}. The servers' "
                "workers must reach the trainer at an address of this host; give one."
            ) from error
        known_as = resolve(address)
        place = address if known_as == address else f"{address} ({known_as})"
        counts = [int(self._call(url, "/get_world_size", get=True)["world_size"]) for url in self.urls]
        pool = ThreadPoolExecutor(len(self.urls))
        told: list[Future[Any]] = []
        for number, url in enumerate(self.urls):
            info = push.init_info(sum(counts[:number]), sum(counts))
            told.append(pool.submit(self._call, url, "/init_weight_transfer_engine", {"init_info": info}))

        def failed() -> None:
            for call in told:
                if call.done() and (error := call.exception()) is not None:
                    raise InputError(
                        f"`rollout.sampler`: {error} Its workers must reach the trainer at {place}; set "
                        "rollout.sampler.address to one that they can, and see the server's log."
                    ) from error

        try:
            push.connect(sum(counts), failed)
            for call in told:
                call.result()
        except _ServerError:
            failed()
            raise
        except OSError as error:
            failed()
            raise InputError(
                f"`rollout.sampler`: not all workers of the servers came to the trainer at {place}: {error}. Set "
                "rollout.sampler.address to an address of this host that they can reach, and see the servers' logs."
            ) from error
        finally:
            pool.shutdown(wait=False)

    def _check_versions(self) -> None:
        """The servers must hold what rank 0 has pushed: one that was started anew has its first weights again."""
        if self._rank:
            return
        for url in self.urls:
            held = self._call(url, "/weight_info", get=True)["weight_version"]
            if self._version is None or held != self._version:
                raise StaleSamplerError(
                    f"The server at {url} does not hold the policy's weights: "
                    + (
                        "they were not handed over."
                        if self._version is None
                        else "it was started anew, or given others."
                    )
                    + " Give the same command again to go on."
                )

    def _open_update(self) -> None:
        self._all("/pause?mode=wait")

        def start(url: str) -> None:
            try:
                self._call(url, "/start_weight_update")
            except _ServerError as error:
                if error.status is None:
                    raise
                self._call(url, "/finish_weight_update")  # a trainer that was killed has left an update open
                self._call(url, "/start_weight_update")

        with ThreadPoolExecutor(len(self.urls)) as pool:
            list(pool.map(start, self.urls))

    def _send(self, bucket: list[tuple[str, Tensor]]) -> None:
        """A bucket of weights: described over HTTP, while the bytes go by the push."""
        assert self._push is not None
        info = {
            "names": [name for name, _ in bucket],
            "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
            "shapes": [list(t.shape) for _, t in bucket],
        }
        told: list[Exception] = []

        def tell() -> None:
            try:
                self._all("/update_weights", {"update_info": info})
            except InputError as error:
                told.append(error)

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        try:
            self._push.send([t for _, t in bucket])
        except OSError as error:
            telling.join(10)
            raise (
                told[0]
                if told
                else InputError(f"`rollout.sampler`: the connection for weights broke: {error}. See the servers' logs.")
            ) from error
        telling.join()
        if told:
            raise told[0]

    def _answers(self, url: str, prompt: PromptTokens, sampling: SamplingConfig) -> list[Response]:
        body = {
            "model": self._models[url],
            "prompt": prompt.token_ids,
            "n": sampling.num_responses,
            "seed": prompt.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "max_tokens": sampling.max_response_tokens,
            "stop_token_ids": self._eos,
            **({"logprobs": 0} if prompt.logps else {}),
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        for attempt in range(self.retries + 1):
            try:
                choices = self._call(url, "/v1/completions", body)["choices"]
                return [_response(c, prompt.logps) for c in sorted(choices, key=lambda c: c["index"])]
            except _ServerError as error:
                if not error.again or attempt == self.retries:
                    raise
                time.sleep(self.backoff_s * 2**attempt)
        raise AssertionError


class _ServerError(InputError):
    def __init__(self, message: str, again: bool, status: int | None = None) -> None:
        super().__init__(f"`rollout.sampler`: {message}")
        self.again, self.status = again, status


_PUSHES: dict[str, type[TCPPush] | type[NCCLPush]] = {"tcp": TCPPush, "nccl": NCCLPush}


def _own_address(url: str) -> str:
    """This host's address on the way to a server."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname, port), timeout=10) as connection:
        return connection.getsockname()[0]


def _response(choice: Mapping[str, Any], wanted: bool) -> Response:
    ids = list(choice["token_ids"])
    logps = list(choice["logprobs"]["token_logprobs"]) if choice.get("logprobs") else []
    if wanted and len(ids) != len(logps):
        raise InputError(
            f"`rollout.sampler`: a server gave {len(logps)} log-probs for {len(ids)} tokens. Its vLLM is of a version "
            "that is not known here."
        )
    return Response(ids, logps, finished=choice["finish_reason"] == "stop")
