"""The interface of rewards: samples in, results or failures out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_pl.models.chat import Message, Tools, message_text
from rlhf_pl.models.rendering import Rendered, Renderer
from rlhf_pl.utils.fingerprints import describe
from rlhf_pl.utils.renamed_methods import map_renamed_methods
from rlhf_pl.utils.terminal import summarize

MAX_DETAIL = 1000  # characters of a failure's detail that are stored
MAX_KIND = 100
MAX_NAME = 200  # characters of a component's name


@dataclass(frozen=True)
class Sample:
    """A response to score.

    Args:
        prompt_id: Id of the prompt's row.
        messages: The conversation before the response, including the system prompt.
        response: The response's text without special tokens; may be empty, for example if it is only a tool call.
        response_tokens: The response's token ids; may be empty for text that was not sampled.
        finished: Whether the response ended with an EOS (False: truncated at the length limit).
        columns: The other columns of the prompt's row, for example an answer key.
        message: The response as an assistant message with its tool calls; None if `response` is all of it.
        tools: The `tools` that chat templates receive.
        chat_template_kwargs: Further variables for chat templates.
    """

    prompt_id: str
    messages: list[Message]
    response: str
    response_tokens: Sequence[int] = ()
    finished: bool = True
    columns: Mapping[str, Any] = field(default_factory=dict)
    message: Message | None = None
    tools: Tools | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text of the last message, usually the user's."""
        return message_text(self.messages[-1])

    @property
    def response_message(self) -> Message:
        """The response as an assistant message."""
        return {"role": "assistant", "content": self.response} if self.message is None else self.message

    def rendered(self, render: Renderer) -> Rendered:
        """The conversation with the response, rendered for a reward model."""
        return render(self.messages, self.response_message, self.tools, self.chat_template_kwargs)


@dataclass(frozen=True)
class RewardResult:
    """The score of a response.

    Args:
        reward: The number used in training: finite, with an absolute value of at most 1e12.
        components: Its parts by name, for the logs.
        truncated_tokens: Number of tokens that were removed because the conversation was too long for a reward model.
    """

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    truncated_tokens: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a response has no reward. Rewards may return it instead of a result.

    Args:
        kind: `timeout`, `exception`, `not_finite`, `wrong_count`, `wrong_type`, `unreachable` or `refused`.
        detail: A sentence. Secrets are removed. Over 1,000 characters it is shorten; the error log has the full text.
        final: Whether another attempt is useless, for example because it was retried already.
    """

    kind: str
    detail: str
    final: bool = False

    def __post_init__(self) -> None:
        for name, limit in (("kind", MAX_KIND), ("detail", MAX_DETAIL)):
            object.__setattr__(self, name, summarize(getattr(self, name), limit))


class Reward(ABC):
    """Scores responses. To use your own, name a subclass in `rollout.reward.class_path`."""

    _abandoned_calls = 0  # calls that could not be interrupted, counted in guard.py

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        map_renamed_methods(cls, {"rest": "release_gpu"})

    @abstractmethod
    def score(self, batch: Sequence[Sample]) -> Sequence["RewardResult | Failure"]:
        """Score a batch: one finite result per sample, in order, or a Failure for a response without a score.

        The samples are copies and may be changed. Plain numbers are accepted as results, and an array or tensor of
        numbers as a list. If it raises, even SystemExit, the whole call has failed.
        """

    def check(self, samples: Sequence[Sample]) -> None:  # noqa: B027 - nothing to check is a fine default
        """Raise InputError for errors that can be found before any model loads.

        Args:
            samples: A few real prompts with made-up responses, one of them empty.
        """

    @property
    def trial(self) -> bool:
        """Whether the samples of `check` are also scored before any model loads, to find errors early."""
        return False

    @property
    def one_by_one(self) -> bool:
        """Whether each response is scored in a call of its own under the time limit, rather than a batch per call."""
        return False

    @property
    def by_prompt(self) -> bool:
        """Whether the responses to a prompt are compared with each other, and must be scored in the same call."""
        return False

    @property
    def is_remote(self) -> bool:
        """Whether a service computes the scores. Responses are then scored while others are still sampled.

        `score` is called in a thread, which can't be interrupted while it waits. It should have its own time limit.
        """
        return False

    @property
    def limits_itself(self) -> bool:
        """Whether `score` has its own time limit. Calls in a thread then have no other limit."""
        return False

    def open(self) -> None:  # noqa: B027 - nothing to load is a fine default
        """Load what scoring needs. Called before every `score`, without a time limit."""

    def release_gpu(self) -> None:  # noqa: B027 - nothing to move is a fine default
        """Free the GPU until the next call, while the policy trains."""

    def close(self) -> None:  # noqa: B027 - nothing to close is a fine default
        """Release weights and connections."""

    @property
    def name(self) -> str:
        """The reward's name in logs and manifests."""
        return type(self).__name__

    def fingerprint(self) -> str:
        """A text that changes if the scores may change; by default the class and its settings."""
        return describe(self)
