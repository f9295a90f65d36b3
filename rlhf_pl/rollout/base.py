"""The interface of a sampler: its requests, its responses and its base class."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.renamed_methods import map_renamed_methods

LOGP_TEMPERATURE = 1.0  # of the log-probs that samplers record, which are over the whole vocabulary
NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled.

    Args:
        num_responses: Responses per prompt.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Sample from the smallest set of tokens with this total probability; 1 for all.
        top_k: Sample from this many most likely tokens; 0 for all.
        min_p: Drop tokens less likely than this fraction of the most likely token's probability; 0 for none.
        max_response_tokens: Responses are truncated at this length, in tokens.
    """

    num_responses: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_response_tokens: int = 256

    def __post_init__(self) -> None:
        rules = [
            ("num_responses", self.num_responses >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p < 1, "from 0 to below 1"),
            ("max_response_tokens", self.max_response_tokens >= 1, "1 or more"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise InputError(f"`sampling.{name}` must be {rule}, got {getattr(self, name)}.")
        if self.temperature == 0 and self.num_responses > 1:
            raise InputError(
                f"`sampling.temperature` is 0, so all {self.num_responses} responses to a prompt would be the same. "
                "Raise it, or set `num_responses` to 1."
            )


@dataclass(frozen=True)
class PromptTokens:
    """One request.

    Args:
        token_ids: The prompt's token ids.
        seed: Response i is sampled with `seed + i`.
        logps: Whether to return the responses' log-probs, which cost an engine up to a third of its speed.
    """

    token_ids: list[int]
    seed: int
    logps: bool = True


@dataclass(frozen=True)
class Response:
    """One response.

    Args:
        token_ids: The sampled tokens; the last is an EOS id if `finished`.
        logps: Log-prob of each token under the whole vocabulary at temperature 1, nats; may be empty if they were not
            requested.
        finished: False if the response was truncated at the length limit.
    """

    token_ids: list[int]
    logps: list[float]
    finished: bool


@dataclass(frozen=True)
class EngineSpec:
    """What a sampler needs to start.

    Args:
        source: The policy's folder or Hub id: architecture and tokenizer. `load_weights` provides the weights.
        max_model_tokens: Tokens of the longest prompt with its response.
        max_sequences: The largest number of responses that will be requested at once.
        trainer_bytes: Device memory that the trainer occupies during sampling, from the second round on.
    """

    source: ModelSource
    max_model_tokens: int
    max_sequences: int
    trainer_bytes: int = 0


class Sampler(ABC):
    """Samples responses from the policy. Subclass it and name your class in `rollout.sampler.class_path`.

    Lifecycle: `start` once, then for every policy `wake`, `invalidate_weights`, `load_weights`, any number of
    `reset` and `generate`, `sleep`; `close` last.
    Equal seeds must give equal responses, independent of other requests at the same time. In a run of several
    processes each has its own sampler, on its own device, and all of them iterate over the stream of the policy's
    weights together.
    """

    start_note = ""  # shown during a slow start
    ranks_per_engine = 1  # ranks that sample the same responses together, such as those of tensor parallelism

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        map_renamed_methods(cls, {"forget": "invalidate_weights", "held_weights": "readable_weights"})

    @abstractmethod
    def start(self, spec: EngineSpec) -> None:
        """Build the engine. Raises InputError if the engine is not installed."""

    @abstractmethod
    def load_weights(self, tensors: NamedTensors) -> None:
        """Replace all weights: (Hugging Face name, full tensor) as in a state dict, tied ones included."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield (index into `prompts`, its responses) as prompts finish, in any order."""

    def invalidate_weights(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Fill all weights with NaN, so that a weight that the following `load_weights` misses is noticed.

        Args:
            tensors: The tensors that `load_weights` will get; only names and shapes are used.
        """

    def readable_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that can be read back under their Hugging Face names; engines fuse or repack many of them."""
        return iter(())

    def reset(self) -> None:  # noqa: B027
        """Clear the state of earlier prompts, such as cached prefixes, so that it does not affect later results."""

    def check(self) -> None:  # noqa: B027 - by default there is nothing to check
        """Raise InputError for problems that can be detected before anything loads."""

    def check_rotary(self, config: Any, longest: int) -> None:  # noqa: B027
        """Raise InputError if the engine's rotary factors would differ from those of the run's longest row.

        Args:
            config: The policy's config.
            longest: Tokens of the longest prompt with its response.
        """

    def reshapes(self) -> list[str]:
        """The sampler's own options, with values, that make sampled tokens and recorded log-probs inconsistent.

        The options of `SamplingConfig` are not included. Called after `check`, before anything loads.
        """
        return []

    def sleep(self) -> None:  # noqa: B027 - an engine may have no memory to release
        """Release memory until `wake`; the weights may be lost."""

    def wake(self) -> None:  # noqa: B027
        """Undo `sleep`; `load_weights` follows."""

    def close(self) -> None:  # noqa: B027
        """Release all resources."""
