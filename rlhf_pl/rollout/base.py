"""What a sampler takes and gives."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError

NOTED_TEMPERATURE = 1.0  # of the log-probs that samplers note, which are over the whole vocabulary
NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class SamplingConfig:
    """How answers are drawn.

    Args:
        num_responses: Answers per prompt.
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Draw from the smallest set of tokens that holds this probability; 1 for all.
        top_k: Draw from this many most likely tokens; 0 for all.
        min_p: Drop tokens less likely than this share of the likeliest; 0 for none.
        max_response_tokens: An answer is cut at this length, in tokens.
    """

    num_responses: int = 5
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
                f"`sampling.temperature` is 0, so all {self.num_responses} answers of a prompt would be the same. "
                "Raise it, or set `num_responses` to 1."
            )


@dataclass(frozen=True)
class PromptTokens:
    """One request.

    Args:
        token_ids: The prompt's.
        seed: Of its answers: answer i is drawn with `seed + i`.
        logps: Whether the answers' log-probs are wanted, which cost an engine up to a third of its speed.
    """

    token_ids: list[int]
    seed: int
    logps: bool = True


@dataclass(frozen=True)
class Response:
    """One answer.

    Args:
        token_ids: What was drawn; ends with an EOS id if `finished`.
        logps: Log-prob of each token under the whole vocabulary at temperature 1, nats; may be empty where they were
            not wanted.
        finished: False if the answer was cut at the length limit.
    """

    token_ids: list[int]
    logps: list[float]
    finished: bool


@dataclass(frozen=True)
class EngineSpec:
    """What a sampler must know to start.

    Args:
        source: The policy's folder or Hub id: architecture and tokenizer. Weights come by `load_weights`.
        max_model_tokens: The longest prompt plus answer, in tokens.
        max_sequences: The most answers that will be asked for at a time.
        trainer_bytes: What the trainer will hold on the device while answers are drawn, from its second round on.
    """

    source: ModelSource
    max_model_tokens: int
    max_sequences: int
    trainer_bytes: int = 0


class Sampler(ABC):
    """Draws answers from the policy. Subclass it and name your class in `rollout.sampler.class_path`.

    Life: `start` once, then for every policy `wake`, `invalidate_weights`, `load_weights`, any number of
    `reset` and `generate`, `sleep`; `close` last.
    Equal seeds must give equal answers, whatever else is drawn at the same time. In a run of several processes each has
    its own sampler, on its own device, and the policy's weights are a stream that all of them go through together.
    """

    start_note = ""  # shown while it starts, where that takes long
    ranks_per_engine = 1  # ranks that draw the same answers together, such as those of tensor parallelism

    @abstractmethod
    def start(self, spec: EngineSpec) -> None:
        """Build the engine. Raises InputError when the engine is not installed."""

    @abstractmethod
    def load_weights(self, tensors: NamedTensors) -> None:
        """Replace all weights: (Hugging Face name, full tensor) as in a state dict, tied ones included."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        """Yield (index into `prompts`, its answers) as prompts finish, in any order."""

    def invalidate_weights(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Replace all weights by NaN, so that one that the following `load_weights` misses can't go unnoticed.

        Args:
            tensors: What `load_weights` will be given; only names and shapes are used.
        """

    def readable_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that can be read back under their Hugging Face names; engines fuse or repack many."""
        return iter(())

    def reset(self) -> None:  # noqa: B027
        """Forget what earlier prompts left behind, such as cached prefixes: what follows depends on itself alone."""

    def check(self) -> None:  # noqa: B027 - nothing to check is a fine default
        """Raise InputError for what can be known to fail before anything loads."""

    def check_rotary(self, config: Any, longest: int) -> None:  # noqa: B027
        """Raise InputError where the engine's rotary factors would be others than those of a run's longest row.

        Args:
            config: The policy's.
            longest: Tokens of the longest prompt with its response.
        """

    def reshapes(self) -> list[str]:
        """Options of its own, with their values, by which it draws from another distribution than it notes.

        What a `SamplingConfig` says is not among them. Asked after `check`, before anything loads.
        """
        return []

    def sleep(self) -> None:  # noqa: B027 - engines without memory to give back need not act
        """Give memory back until `wake`; the weights may be lost."""

    def wake(self) -> None:  # noqa: B027
        """Undo `sleep`; `load_weights` follows."""

    def close(self) -> None:  # noqa: B027
        """Free everything."""
