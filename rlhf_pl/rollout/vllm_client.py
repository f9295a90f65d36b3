"""What a run asks of `vllm serve` processes: whether they can serve it, and responses to prompts."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from rlhf_pl.rollout.base import EngineSpec, PromptTokens, Response, SamplingConfig
from rlhf_pl.rollout.served_engine import LAUNCH, ServedEngine, ServerError
from rlhf_pl.utils.errors import InputError


class VLLMClient:
    """Puts a run's questions to servers. `ServedEngine` is the connection to one of them.

    Args:
        dtype: What the servers must compute in.
        transport: How they get weights, as the option says.
        backend: Of the weight transfer that they must be started with for that.
    """

    def __init__(self, dtype: str, transport: str, backend: str) -> None:
        self.dtype, self.transport, self.backend = dtype, transport, backend
        self.eos_token_ids: list[int] = []
        self.longest = 0  # tokens of a prompt with its response

    def begin(self, spec: EngineSpec) -> None:
        """From here on servers must have room for the sequences of `spec`, and stop where its policy does."""
        self.eos_token_ids, self.longest = list(spec.source.eos_token_ids), spec.max_model_tokens

    def config(self, engine: ServedEngine) -> dict[str, Any]:
        """A server's settings."""
        return engine.config(self.backend)

    def check(self, engine: ServedEngine) -> None:
        """Refuse a server that can't be used.

        Raises:
            InputError: It takes weights in another way, computes in another dtype, or can't sample with a seed.
        """
        url, config = engine.url, self.config(engine)
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if backend != self.backend:
            raise InputError(
                f"`rollout.sampler.urls`: the server at {url} takes weights by backend {backend!r}, but transport "
                f"{self.transport} needs {self.backend!r}. Start it as {LAUNCH % self.backend}"
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

    def name_model(self, engine: ServedEngine) -> None:
        """Note the name that a server's model has.

        Raises:
            InputError: It has no room for the longest prompt with its response.
        """
        model = engine.served()
        room = model.get("max_model_len") or math.inf
        if room < self.longest:
            raise InputError(
                f"`rollout.sampler.urls`: the server at {engine.url} has room for {room} tokens, but prompt plus "
                f"answer take up to {self.longest}. Start it with --max-model-len {self.longest}, or lower "
                "data.max_prompt_tokens or rollout.sampling.max_response_tokens."
            )
        engine.model = model["id"]

    def sample(
        self, engine: ServedEngine, prompt: PromptTokens, sampling: SamplingConfig
    ) -> list[Response] | ServerError:
        """The responses to a prompt, or what the request ended with."""
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
        read = partial(_responses, count=sampling.num_responses, wanted=prompt.logps)
        try:
            return engine.call("/v1/completions", body, read=read)
        except ServerError as error:
            return error


def _responses(told: Mapping[str, Any], count: int, wanted: bool) -> list[Response]:
    """The answers in a completion; raises IndexError if there are not so many."""
    choices = {choice["index"]: choice for choice in told["choices"]}
    if set(choices) != set(range(count)):
        raise IndexError(f"{sorted(choices)} are not {count} answers")
    return [_response(choices[i], wanted) for i in range(count)]


def _response(choice: Mapping[str, Any], wanted: bool) -> Response:
    ids = list(map(int, choice["token_ids"]))
    logps = list(map(float, choice["logprobs"]["token_logprobs"])) if choice.get("logprobs") else []
    if wanted and len(ids) != len(logps):
        raise InputError(
            f"`rollout.sampler`: a server gave {len(logps)} log-probs for {len(ids)} tokens. Its vLLM is of a version "
            "that is not known here."
        )
    return Response(ids, logps, finished=choice["finish_reason"] == "stop")
