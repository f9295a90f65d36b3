"""What a reward takes and gives."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_pl.models.chat import Message, Tools, message_text
from rlhf_pl.models.rendering import Rendered, Renderer
from rlhf_pl.utils.fingerprints import describe
from rlhf_pl.utils.terminal import summary

MAX_DETAIL = 1000  # characters of a failure that are stored
MAX_KIND = 100
MAX_NAME = 200  # of a component


@dataclass(frozen=True)
class Sample:
    """One answer to be scored.

    Args:
        prompt_id: Id of the prompt's row.
        messages: The conversation before the answer, system prompt included.
        response: The answer's text, special tokens left out; may be empty, as for a tool call alone.
        response_tokens: The answer's token ids; may be empty for text that was not sampled.
        finished: Whether the answer ended with an EOS (False: cut at the length limit).
        columns: The other columns of the prompt's row, such as an answer key.
        message: The answer as the assistant's message, with its tool calls; None for one that is `response` alone.
        tools: What chat templates are given as `tools`.
        chat_template_kwargs: Further variables of chat templates.
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
        """Text of the last message, usually the user's."""
        return message_text(self.messages[-1])

    @property
    def response_message(self) -> Message:
        """The answer as a message of the assistant's."""
        return {"role": "assistant", "content": self.response} if self.message is None else self.message

    def rendered(self, render: Renderer) -> Rendered:
        """The conversation as a reward model reads it."""
        return render(self.messages, self.response_message, self.tools, self.chat_template_kwargs)


@dataclass(frozen=True)
class RewardResult:
    """A score.

    Args:
        reward: The number that training goes by; finite, and of at most 1e12 in size.
        components: Named parts of it, for the logs.
        truncated_tokens: Tokens that a reward model did not get to see because the conversation was too long for it.
    """

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    truncated_tokens: int = 0


@dataclass(frozen=True)
class Failure:
    """Why an answer has no reward. Rewards may return it in place of a result.

    Args:
        kind: `timeout`, `exception`, `not_finite`, `wrong_count`, `wrong_type` or `unreachable`.
        detail: A sentence. Secrets are left out, and what is longer than 1,000 characters goes to the log of errors.
        final: Whether there is no use in more attempts, such as because it was tried again already.
    """

    kind: str
    detail: str
    final: bool = False

    def __post_init__(self) -> None:
        for name, limit in (("kind", MAX_KIND), ("detail", MAX_DETAIL)):
            object.__setattr__(self, name, summary(getattr(self, name), limit))


class Reward(ABC):
    """Scores answers. Subclass it and name your class in `rollout.reward.class_path`."""

    _given_up = 0  # calls that did not let themselves be interrupted; counted by the guard

    @abstractmethod
    def score(self, batch: Sequence[Sample]) -> Sequence["RewardResult | Failure"]:
        """One finite result per sample, in their order; a Failure for an answer that has none.

        The samples are copies, which may be changed. Plain numbers are taken for results, and an array or tensor of
        them for a list. What is raised, SystemExit included, is the failure of the whole call.
        """

    def check(self, samples: Sequence[Sample]) -> None:  # noqa: B027 - nothing to check is a fine default
        """Raise InputError for what can be known to fail before any model loads.

        Args:
            samples: A few real prompts with made-up answers, an empty one among them.
        """

    @property
    def trial(self) -> bool:
        """Whether the samples of `check` are also scored before any model loads, to find mistakes early."""
        return False

    @property
    def one_by_one(self) -> bool:
        """Whether answers are scored one at a time, each under the time limit, rather than many in one call."""
        return False

    @property
    def by_prompt(self) -> bool:
        """Whether a prompt's answers are scored against each other, so that they have to be in one call."""
        return False

    @property
    def is_remote(self) -> bool:
        """Whether the scores are computed elsewhere: answers are then scored while others are still drawn.

        `score` is called in a thread, which can't be interrupted while it waits: have it limit itself.
        """
        return False

    @property
    def limits_itself(self) -> bool:
        """Whether every call ends by a time limit of its own: then no other one counts for calls in a thread."""
        return False

    def open(self) -> None:  # noqa: B027 - nothing to load is a fine default
        """Load what scoring needs, outside of the time limit; called before every `score`."""

    def release_gpu(self) -> None:  # noqa: B027 - nothing to move is a fine default
        """Free the GPU until the next call: the policy trains now."""

    def close(self) -> None:  # noqa: B027 - nothing to close is a fine default
        """Give back weights and connections."""

    @property
    def name(self) -> str:
        """What logs and manifests call it."""
        return type(self).__name__

    def fingerprint(self) -> str:
        """Changes when the scores would change, as far as that can be known: by default the class and its settings."""
        return describe(self)
