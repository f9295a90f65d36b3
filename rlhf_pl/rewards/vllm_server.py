"""A reward model that `vllm serve` runs, elsewhere or on another GPU."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlhf_pl.errors import InputError
from rlhf_pl.policy import PolicySource
from rlhf_pl.rendering import Renderer, SystemPrompt, reward_tokenizer
from rlhf_pl.rewards.base import Failure, Reward, RewardResult, Sample
from rlhf_pl.rewards.remote import Service, WrongAnswerError, number


class VLLMServerReward(Reward):
    """A classifier or reward model under `vllm serve MODEL --runner pooling`.

    Conversations are rendered here, by the reward model's own tokenizer and template, and sent as token ids. Scores are
    the model's logits: vLLM's default sigmoid is turned off.

    Args:
        url: The server, such as `http://localhost:8000`.
        tokenizer: Folder or Hub id of the reward model's tokenizer.
        model: Name it is served under; null for `tokenizer`.
        endpoint: `classify` for models with one label, `pooling` for reward models that vLLM serves for that task;
            of scores per token or step the last one counts.
        max_tokens: Longer conversations are cut from the left of the prompt, and counted; the server's
            `--max-model-len` must be at least this.
        system_prompt: `keep` or `drop` system messages.
        concurrency: Requests under way at a time; each holds one conversation, the server batches them.
        timeout_s: Time limit of an attempt, seconds, from connecting to the last byte.
        retries: Further attempts after a broken connection or an error of the server's.
        backoff_s: Pause before the second attempt, seconds; doubled before every further one.
        api_key_env: Environment variable with a key that is sent as a bearer token; null for none.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
    """

    def __init__(
        self,
        url: str,
        tokenizer: str,
        model: str | None = None,
        endpoint: Literal["classify", "pooling"] = "classify",
        max_tokens: int = 4096,
        system_prompt: SystemPrompt = "keep",
        concurrency: int = 64,
        timeout_s: float = 120.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        api_key_env: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        if max_tokens < 2:
            raise InputError(f"`rollout.reward.max_tokens` must be 2 or more, got {max_tokens}.")
        self.url, self.model, self.endpoint = url, model or tokenizer, endpoint
        self.max_tokens, self.system_prompt = max_tokens, system_prompt
        self._source = PolicySource(tokenizer, None, chat_template, False, "rollout.reward.tokenizer")
        address = f"{url.rstrip('/')}/{endpoint}"
        self._service = Service(address, timeout_s, retries, backoff_s, concurrency, api_key_env)
        self._renderer: Renderer | None = None

    @property
    def name(self) -> str:
        return f"VLLMServerReward({self.model})"

    @property
    def trial(self) -> bool:
        return True

    @property
    def is_remote(self) -> bool:
        return True

    def renderer(self) -> Renderer:
        """Renders conversations as the model reads them."""
        if self._renderer is None:
            tokenizer = reward_tokenizer(self._source, False)
            self._renderer = Renderer(tokenizer, self.max_tokens, self.system_prompt, option="rollout.reward.tokenizer")
        return self._renderer

    def check(self, samples: Sequence[Sample]) -> None:
        self._service.check()
        for sample in samples:
            sample.rendered(self.renderer())

    def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
        rows = [s.rendered(self.renderer()) for s in batch]
        task = {"task": "classify"} if self.endpoint == "pooling" else {}
        payloads = [{"model": self.model, "input": [row.ids], "use_activation": False, **task} for row in rows]
        scores = self._service.map(payloads, lambda i, body: _score(body))
        return [
            s if isinstance(s, Failure) else RewardResult(s, truncated_tokens=row.truncated_tokens)
            for s, row in zip(scores, rows, strict=True)
        ]


def _score(body: Any) -> float:
    """The one score in an answer of `/classify` or `/pooling`."""
    data = body.get("data") if isinstance(body, Mapping) else None
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], Mapping):
        raise WrongAnswerError('expected an object with one entry under "data"')
    values: Any = data[0].get("probs", data[0].get("data"))
    while isinstance(values, list) and values and isinstance(values[-1], list):
        values = values[-1]
    if not isinstance(values, list):
        raise WrongAnswerError("expected a list of scores")
    if len(values) != 1 and "probs" in data[0]:
        raise WrongAnswerError(f"the model gives {len(values)} labels; a reward model has 1")
    if not values:
        raise WrongAnswerError("the list of scores is empty")
    return number(values[-1], "the score")
