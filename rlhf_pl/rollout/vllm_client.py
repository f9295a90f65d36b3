"""The requests of a run to `vllm serve` processes: checks of their settings, and completions."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from rlhf_pl.rollout.base import EngineSpec, PromptTokens, Response, SamplingConfig
from rlhf_pl.rollout.served_engine import LAUNCH_COMMAND, ServedEngine, ServerError
from rlhf_pl.utils.errors import InputError


class VLLMClient:
    """Sends a run's requests to servers. `ServedEngine` is the connection to one of them.

    Args:
        dtype: Dtype that the servers must compute in.
        transport: The option of the sampler: how the servers get weights.
        backend: Backend of the weight transfer that the servers must be started with for that.
    """

    def __init__(self, dtype: str, transport: str, backend: str) -> None:
        self.dtype, self.transport, self.backend = dtype, transport, backend
        self.eos_token_ids: list[int] = []
        self.longest = 0  # tokens of a prompt with its response

    def configure(self, spec: EngineSpec) -> None:
        """Set the stop tokens and the longest sequence that servers must support, from `spec`."""
        self.eos_token_ids, self.longest = list(spec.source.eos_token_ids), spec.max_model_tokens

    def get_config(self, engine: ServedEngine) -> dict[str, Any]:
        """A server's settings."""
        return engine.get_config(self.backend)

    def check(self, engine: ServedEngine) -> None:
        """Refuse a server that can't be used.

        Raises:
            InputError: It has another backend for weights or another dtype, or can't sample with a seed.
        """
        url, config = engine.url, self.get_config(engine)
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if backend != self.backend:
            raise InputError(
                f"`rollout.sampler.urls`: the server at {url} accepts weights with backend {backend!r}, but transport "
                f"{self.transport} needs {self.backend!r}. Start it as {LAUNCH_COMMAND % self.backend}"
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
                "sample with a seed. Start it with --no-enable-chunked-prefill."
            )

    def read_model_name(self, engine: ServedEngine) -> None:
        """Set `engine.model` to the name of its model.

        Raises:
            InputError: The server has no room for the longest prompt with its response.
        """
        model = engine.get_model_info()
        room = model.get("max_model_len") or math.inf
        if room < self.longest:
            raise InputError(
                f"`rollout.sampler.urls`: the server at {engine.url} has room for {room} tokens, but a prompt with "
                f"its response takes up to {self.longest}. Start it with --max-model-len {self.longest}, or lower "
                "data.max_prompt_tokens or rollout.sampling.max_response_tokens."
            )
        engine.model = model["id"]

    def sample(
        self, engine: ServedEngine, prompt: PromptTokens, sampling: SamplingConfig
    ) -> list[Response] | ServerError:
        """Sample the responses to a prompt; returns the error if the request failed."""
        body = {
            "model": engine.model,
            "prompt": prompt.token_ids,
            "n": sampling.num_responses,
            "seed": prompt.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "max_tokens": sampling.max_response_tokens,
            "stop_token_ids": self.eos_token_ids,
            **({"logprobs": 0} if prompt.logps else {}),
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        parse = partial(parse_responses, count=sampling.num_responses, with_logps=prompt.logps)
        try:
            return engine.call("/v1/completions", body, parse=parse)
        except ServerError as error:
            return error


def parse_responses(reply: Mapping[str, Any], count: int, with_logps: bool) -> list[Response]:
    """The responses in a server's reply; raises IndexError if there are not `count` of them."""
    choices = {choice["index"]: choice for choice in reply["choices"]}
    if set(choices) != set(range(count)):
        raise IndexError(f"{sorted(choices)} are not {count} responses")
    return [_parse_response(choices[i], with_logps) for i in range(count)]


def _parse_response(choice: Mapping[str, Any], with_logps: bool) -> Response:
    ids = list(map(int, choice["token_ids"]))
    logps = list(map(float, choice["logprobs"]["token_logprobs"])) if choice.get("logprobs") else []
    if with_logps and len(ids) != len(logps):
        raise InputError(
            f"`rollout.sampler`: a server returned {len(logps)} log-probs for {len(ids)} tokens. Its version of vLLM "
            "is not supported."
        )
    return Response(ids, logps, finished=choice["finish_reason"] == "stop")
