"""A sampler with vLLM servers on other GPUs or nodes: responses over HTTP, weights by vLLM's weight transfer."""

import queue
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_pl.models.rotary import thresholds
from rlhf_pl.models.rounding import round_to
from rlhf_pl.rewards.exposed_servers import warn_about_open_servers
from rlhf_pl.rollout.background import run_in_thread
from rlhf_pl.rollout.base import EngineSpec, NamedTensors, PromptTokens, Response, Sampler, SamplingConfig
from rlhf_pl.rollout.checkpoint_format import make_checkpoint_converter
from rlhf_pl.rollout.dispatch import Dispatch
from rlhf_pl.rollout.fleet import Fleet
from rlhf_pl.rollout.served_engine import ServedEngine, ServerError
from rlhf_pl.rollout.vllm_checks import check_engine_rotary, find_distribution_options
from rlhf_pl.rollout.vllm_client import VLLMClient
from rlhf_pl.rollout.weight_sync.routes import Bucket, WeightRoute, WeightRoutes
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError
from rlhf_pl.rollout.weight_sync.transports import NCCLPush, TCPPush
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.retries import check_requests
from rlhf_pl.utils.secrets import check_environment_key, register_url

BUCKET_BYTES = 256 * 2**20  # of weights sent at a time
_TRANSPORTS: dict[str, type[TCPPush] | type[NCCLPush]] = {"tcp": TCPPush, "nccl": NCCLPush}


class VLLMServerSampler(Sampler):
    """Samples responses with running `vllm serve` processes, and syncs the policy's weights to them after every round.

    You start the servers (docs/scaling.md), with any parallelism, for this run only:
    `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "rlhf_pl"}'`.

    A server that dies, or restarts with its initial weights, is lost: its prompts go to the other servers, and if it is
    back before the next round, it gets the policy's weights again. The run stops if no server is left. Responses are
    accepted only if the server still has the policy's weights afterwards.

    Args:
        urls: The servers, such as `[http://node7:8000]`; each gets a share of the prompts.
        dtype: Dtype that the servers compute in (their `--dtype`); weights are sent in it.
        transport: `tcp` for servers started with backend rlhf_pl, which need this package in addition to vLLM; `nccl`
            for GPUs that NCCL connects, with vLLM's own backend of that name.
        address: Address at which the servers reach rank 0's host; null for its address towards the first server. Rank 0
            listens only there, only while they connect, and rejects connections without the run's token.
        concurrency: Concurrent prompts per server and rank.
        timeout_s: Time limit of a request, seconds: for a prompt's responses, for a part of the weights on every
            connection, or for the servers' workers to connect.
        retries: Further attempts for a prompt after a failure, and to reach a server before it counts as lost.
        backoff_s: Pause before the second attempt, seconds; doubled before each further one.
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
        for url in urls:
            register_url(url)
        invalid = [url for url in urls if not url.startswith(("http://", "https://"))]
        if invalid or not urls:
            raise InputError(
                "`rollout.sampler.urls` must be a list of addresses that begin with http:// or https://, got "
                f"{invalid[0] if invalid else urls!r}."
            )
        self._retries = check_requests("rollout.sampler", concurrency, timeout_s, retries, backoff_s)
        self.urls, self.dtype, self.transport, self.address = [u.rstrip("/") for u in urls], dtype, transport, address
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self.api_key_env = api_key_env
        engines = [ServedEngine(url, timeout_s, api_key_env) for url in self.urls]
        self._fleet = Fleet(engines, self._retries)
        self._routes: WeightRoutes | None = None  # on rank 0
        self._client = VLLMClient(dtype, transport, _TRANSPORTS[transport].backend)
        self._expected_names: set[str] = set()
        self._rank = 0
        self._check_rotary: Callable[[ServedEngine], None] = lambda engine: None
        self._version: str | None = None  # of the policy's weights on the servers; None until they have them
        self._last_version: str | None = None  # of the last weights that were sent

    def check(self) -> None:
        """Check that at least one server is available, and that the available ones have the required settings."""
        check_environment_key("rollout.sampler.api_key_env", self.api_key_env)
        warn_about_open_servers(self.urls)
        self._fleet.call_available(self._client.check)

    def check_rotary(self, config: Any, longest: int) -> None:
        if not thresholds(config):
            return

        def check(engine: ServedEngine) -> None:
            served = engine.get_model_info().get("max_model_len") or longest
            check_engine_rotary(config, longest, served, f"`rollout.sampler.urls`: --max-model-len of {engine.url}")

        self._check_rotary = check
        self._fleet.call_available(check)

    def reshapes(self) -> list[str]:
        """A server's default sampling options are not included, as requests set all of them."""
        options = []
        for engine, config in self._fleet.call_available(self._client.get_config):
            model = config.get("model_config", {})
            names = [name for name in find_distribution_options(model) if name != "override_generation_config"]
            options += [f"the server at {engine.url} runs with {name} {model[name]!r}" for name in names]
        return options

    def start(self, spec: EngineSpec) -> None:
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._client.configure(spec)
        self._to_checkpoint_format = make_checkpoint_converter(spec.source)
        self._fleet.quiet = self._rank > 0
        self._fleet.call_available(self._client.read_model_name)
        if self._rank == 0:
            address = self.address or _find_own_address(self._fleet.available[0].url)
            engines = self._fleet.engines
            groups = [[engine] for engine in engines] if self.transport == "tcp" else [engines]
            push = partial(_TRANSPORTS[self.transport], address, self.timeout_s)
            routes = [WeightRoute(group, push, address) for group in groups]
            self._routes = WeightRoutes(self._fleet, routes)
            self._routes.connect(self._check_engine, None)

    def invalidate_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Record the names of the expected weights; until all have been sent, sampling is refused."""
        self._expected_names, self._version = set(tensors), None

    def load_weights(self, tensors: NamedTensors) -> None:
        names: set[str] = set()
        bucket: Bucket = []
        routes = self._routes
        if routes is not None:
            routes.connect(self._check_engine, self._last_version)
            routes.run_on_connected(WeightRoute.start_update)
        device = "cpu" if self.transport == "tcp" else None  # with TCP every server gets the same copy

        def cast() -> NamedTensors:
            for name, tensor in tensors:  # all ranks iterate over the stream, rank 0 sends it
                names.add(name)
                if routes is not None:
                    yield name, round_to(tensor.detach(), getattr(torch, self.dtype)).to(device=device)

        def send() -> None:
            if routes is not None and bucket:
                routes.run_on_connected(lambda route: route.send(bucket))
            bucket.clear()

        for name, tensor in self._to_checkpoint_format(cast()):
            bucket.append((name, tensor))
            if sum(t.numel() * t.element_size() for _, t in bucket) >= BUCKET_BYTES:
                send()
        if missing := self._expected_names - names:
            raise StaleSamplerError(
                f"The sampler did not get all weights of the policy: {', '.join(sorted(missing)[:3])} missing."
            )
        send()
        version = secrets.token_hex(8)
        if routes is not None:
            routes.run_on_connected(lambda route: route.finish_update(version))
        self._broadcast_state(version)

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """The servers batch the requests of all ranks; a failed request is sent again, with the same seed."""
        version = self._version
        if version is None:
            raise StaleSamplerError("The servers do not have the policy's weights: they were not synced.")
        for engine in self._fleet.available:
            if problem := self._fleet.find_problem(engine, version, None, lambda: False):
                self._fleet.mark_lost([engine], problem)
        self._fleet.require_available()
        engines = self._fleet.available
        results: queue.Queue[tuple[int, list[Response]] | Exception] = queue.Queue()
        dispatch = Dispatch(len(prompts), len(engines), self.concurrency, self._rank)

        def send_requests(server: int) -> None:
            engine = engines[server]
            try:
                while (index := dispatch.take(server)) is not None:
                    result = self._client.sample(engine, prompts[index], sampling)
                    failure = result if isinstance(result, ServerError) else None
                    # after sampling: a server that has the version now had it during the request
                    if problem := self._fleet.find_problem(engine, version, failure, lambda: dispatch.is_lost(server)):
                        self._fleet.mark_lost([engine], problem)
                        dispatch.mark_lost(server)
                        dispatch.put_back(server, index)
                        self._fleet.require_available()
                    elif isinstance(result, ServerError):
                        pause = self._retries.pause(dispatch.record_failure(server, index))
                        if pause is None or not result.is_retryable:
                            raise result
                        time.sleep(pause)
                        dispatch.put_back(server, index)
                    else:
                        dispatch.mark_done(server)
                        results.put((index, result))
            except Exception as error:
                results.put(error)

        try:
            for number in range(min(self.concurrency, len(prompts)) * len(engines)):
                run_in_thread(send_requests, number % len(engines))
            for _ in prompts:
                result = results.get()
                if isinstance(result, Exception):
                    raise result
                yield result
        finally:
            dispatch.stop()

    def close(self) -> None:
        if self._routes is not None:
            self._routes.close()
            self._routes = None
        for engine in self._fleet.engines:
            engine.close()

    def _check_engine(self, engine: ServedEngine) -> None:
        """Check whether a server that is (again) available can be used."""
        self._client.check(engine)
        self._check_rotary(engine)
        self._client.read_model_name(engine)

    def _broadcast_state(self, version: str) -> None:
        """Broadcast from rank 0 which servers have the new weights."""
        state: list[Any] = [(version, self._fleet.lost, [engine.model for engine in self._fleet.engines])]
        if dist.is_initialized():
            dist.broadcast_object_list(state)
        self._version, lost, models = state[0]
        self._last_version = self._version
        if self._rank > 0:
            self._fleet.lost = lost
            for engine, model in zip(self._fleet.engines, models, strict=True):
                engine.model = model


def _find_own_address(url: str) -> str:
    """This host's address in connections to a server.

    Raises:
        InputError: It can't connect to the server directly, for example because there is a proxy.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=10) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        raise InputError(
            f"`rollout.sampler.address`: can't find this host's address towards {url}: {error}. Set the address at "
            "which the servers reach it."
        ) from error
