"""vLLM servers elsewhere, on other GPUs or nodes: answers over HTTP, weights by vLLM's weight transfer."""

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
from rlhf_pl.rewards.exposed_servers import warn_of_open_servers
from rlhf_pl.rollout.background import start
from rlhf_pl.rollout.base import EngineSpec, NamedTensors, PromptTokens, Response, Sampler, SamplingConfig
from rlhf_pl.rollout.checkpoint_format import checkpoint_format
from rlhf_pl.rollout.dispatch import Dispatch
from rlhf_pl.rollout.fleet import Fleet
from rlhf_pl.rollout.served_engine import ServedEngine, ServerError
from rlhf_pl.rollout.vllm_checks import check_engine_rotary, reshaping
from rlhf_pl.rollout.vllm_client import VLLMClient
from rlhf_pl.rollout.weight_sync.routes import Bucket, WeightRoute, WeightRoutes
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError
from rlhf_pl.rollout.weight_sync.transports import NCCLPush, TCPPush
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.retries import check_requests
from rlhf_pl.utils.secrets import check_environment_key, register_url

BUCKET_BYTES = 256 * 2**20  # of weights under way at a time
_PUSHES: dict[str, type[TCPPush] | type[NCCLPush]] = {"tcp": TCPPush, "nccl": NCCLPush}


class VLLMServerSampler(Sampler):
    """Draws answers with running `vllm serve` processes. The policy's weights are pushed to them after every round.

    The servers are started by you (docs/scaling.md), with any parallelism, and serve this run alone:
    `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "rlhf_pl"}'`.

    A server that dies, or that is started anew with old weights, is left out: its prompts go to the others, and it is
    given the policy's weights again before the next round if it is back. The run stops when none is left. An answer
    counts only if the server still has the policy's weights after it.

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
        retries: Further attempts for a prompt after a failure, and to reach a server before it is given up.
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
        for url in urls:
            register_url(url)
        wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
        if wrong or not urls:
            raise InputError(
                "`rollout.sampler.urls` must be a list of addresses that begin with http:// or https://, got "
                f"{wrong[0] if wrong else urls!r}."
            )
        self._retries = check_requests("rollout.sampler", concurrency, timeout_s, retries, backoff_s)
        self.urls, self.dtype, self.transport, self.address = [u.rstrip("/") for u in urls], dtype, transport, address
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self.api_key_env = api_key_env
        engines = [ServedEngine(url, timeout_s, api_key_env) for url in self.urls]
        self._fleet = Fleet(engines, self._retries)
        self._routes: WeightRoutes | None = None  # on rank 0
        self._client = VLLMClient(dtype, transport, _PUSHES[transport].backend)
        self._announced: set[str] = set()
        self._rank = 0
        self._check_rotary: Callable[[ServedEngine], None] = lambda engine: None
        self._version: str | None = None  # what the servers call the policy's weights; None until they have them
        self._pushed: str | None = None  # what they call those that they were last given

    def check(self) -> None:
        """A server must be there, and those that are need what is wanted turned on."""
        check_environment_key("rollout.sampler.api_key_env", self.api_key_env)
        warn_of_open_servers(self.urls)
        self._fleet.of_those_there(self._client.check)

    def check_rotary(self, config: Any, longest: int) -> None:
        if not thresholds(config):
            return

        def check(engine: ServedEngine) -> None:
            served = engine.served().get("max_model_len") or longest
            check_engine_rotary(config, longest, served, f"`rollout.sampler.urls`: --max-model-len of {engine.url}")

        self._check_rotary = check
        self._fleet.of_those_there(check)

    def reshapes(self) -> list[str]:
        """A server's own defaults don't count: a request names every option of sampling."""
        found = []
        for engine, config in self._fleet.of_those_there(self._client.config):
            model = config.get("model_config", {})
            names = [name for name in reshaping(model) if name != "override_generation_config"]
            found += [f"the server at {engine.url} runs with {name} {model[name]!r}" for name in names]
        return found

    def start(self, spec: EngineSpec) -> None:
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._client.begin(spec)
        self._as_stored = checkpoint_format(spec.source)
        self._fleet.quiet = self._rank > 0
        self._fleet.of_those_there(self._client.name_model)
        if self._rank == 0:
            address = self.address or _own_address(self._fleet.there[0].url)
            engines = self._fleet.engines
            groups = [[engine] for engine in engines] if self.transport == "tcp" else [engines]
            push = partial(_PUSHES[self.transport], address, self.timeout_s)
            routes = [WeightRoute(group, push, address) for group in groups]
            self._routes = WeightRoutes(self._fleet, routes)
            self._routes.connect(self._vet, None)

    def invalidate_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Notes what has to come; until it has, no answers are drawn."""
        self._announced, self._version = set(tensors), None

    def load_weights(self, tensors: NamedTensors) -> None:
        names: set[str] = set()
        bucket: Bucket = []
        routes = self._routes
        if routes is not None:
            routes.connect(self._vet, self._pushed)
            routes.each(WeightRoute.open)
        place = "cpu" if self.transport == "tcp" else None  # by TCP every server gets the same copy

        def cast() -> NamedTensors:
            for name, tensor in tensors:  # the stream is put together by all ranks, rank 0 sends it
                names.add(name)
                if routes is not None:
                    yield name, tensor.detach().to(device=place, dtype=getattr(torch, self.dtype))

        def send() -> None:
            if routes is not None and bucket:
                routes.each(lambda route: route.send(bucket))
            bucket.clear()

        for name, tensor in self._as_stored(cast()):
            bucket.append((name, tensor))
            if sum(t.numel() * t.element_size() for _, t in bucket) >= BUCKET_BYTES:
                send()
        if missing := self._announced - names:
            raise StaleSamplerError(
                f"The sampler was not given all weights of the policy: {', '.join(sorted(missing)[:3])} missing."
            )
        send()
        version = secrets.token_hex(8)
        if routes is not None:
            routes.each(lambda route: route.finish(version))
        self._agree(version)

    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Requests of all ranks meet in the servers; a failed one is sent again, with the same seed."""
        version = self._version
        if version is None:
            raise StaleSamplerError("The servers do not hold the policy's weights: they were not handed over.")
        for engine in self._fleet.there:
            if problem := self._fleet.problem(engine, version, None, lambda: False):
                self._fleet.lose([engine], problem)
        self._fleet.require_one()
        engines = self._fleet.there
        answered: queue.Queue[tuple[int, list[Response]] | Exception] = queue.Queue()
        dispatch = Dispatch(len(prompts), len(engines), self.concurrency, self._rank)

        def serve(place: int) -> None:
            engine = engines[place]
            try:
                while (index := dispatch.take(place)) is not None:
                    found = self._client.sample(engine, prompts[index], sampling)
                    failure = found if isinstance(found, ServerError) else None
                    # after the answers: a server that has the version now had it all along
                    if problem := self._fleet.problem(engine, version, failure, lambda: dispatch.is_lost(place)):
                        self._fleet.lose([engine], problem)
                        dispatch.lose(place)
                        dispatch.give_back(place, index)
                        self._fleet.require_one()
                    elif isinstance(found, ServerError):
                        pause = self._retries.pause(dispatch.failed(place, index))
                        if pause is None or not found.again:
                            raise found
                        time.sleep(pause)
                        dispatch.give_back(place, index)
                    else:
                        dispatch.done(place)
                        answered.put((index, found))
            except Exception as error:
                answered.put(error)

        try:
            for number in range(min(self.concurrency, len(prompts)) * len(engines)):
                start(serve, number % len(engines))
            for _ in prompts:
                told = answered.get()
                if isinstance(told, Exception):
                    raise told
                yield told
        finally:
            dispatch.stop()

    def close(self) -> None:
        if self._routes is not None:
            self._routes.close()
            self._routes = None
        for engine in self._fleet.engines:
            engine.close()

    def _vet(self, engine: ServedEngine) -> None:
        """Whether a server that is there anew can be used."""
        self._client.check(engine)
        self._check_rotary(engine)
        self._client.name_model(engine)

    def _agree(self, version: str) -> None:
        """Rank 0 tells the others which servers have the new weights."""
        told: list[Any] = [(version, self._fleet.lost, [engine.model for engine in self._fleet.engines])]
        if dist.is_initialized():
            dist.broadcast_object_list(told)
        self._version, lost, models = told[0]
        self._pushed = self._version
        if self._rank > 0:
            self._fleet.lost = lost
            for engine, model in zip(self._fleet.engines, models, strict=True):
                engine.model = model


def _own_address(url: str) -> str:
    """This host's address on the way to a server.

    Raises:
        InputError: There is no way but a proxy's, say.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname, port), timeout=10) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        raise InputError(
            f"`rollout.sampler.address`: can't find out this host's address on the way to {url}: {error}. Give the one "
            "at which the servers reach it."
        ) from error
