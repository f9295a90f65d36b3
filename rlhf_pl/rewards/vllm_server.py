"""A reward model on a `vllm serve` server, on another host or GPU."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from rlhf_pl.models.pretrained_files import stored_config
from rlhf_pl.models.rendering import Renderer, SystemPrompt, reward_renderer
from rlhf_pl.models.rotary import longrope_scales, thresholds
from rlhf_pl.models.score_position import ScoreAt, mean_score, report_mean_score, warn_if_read_elsewhere
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards.base import Failure, RewardResult, Sample
from rlhf_pl.rewards.exposed_servers import warn_about_open_servers
from rlhf_pl.rewards.remote import InvalidReplyError, RemoteReward, Service, parse_number
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.errors import check_finite as check_finite_numbers
from rlhf_pl.utils.fingerprints import describe


class VLLMServerReward(RemoteReward):
    """A classifier or reward model under `vllm serve MODEL --runner pooling`.

    Conversations are rendered in this process with the reward model's tokenizer and template, and sent as token ids.
    Scores are the model's logits, without vLLM's default sigmoid.

    Args:
        url: URL of the server, for example `http://localhost:8000`.
        tokenizer: Folder or Hub id of the reward model's tokenizer.
        model: Name of the model on the server; null for `tokenizer`.
        endpoint: `classify` for models with one label, `pooling` for reward models that vLLM serves for that task.
            If there are scores per token or step, the last one is used.
        max_tokens: Longer conversations are truncated on the left of the prompt, and counted; the server's
            `--max-model-len` must be at least this.
        system_prompt: `keep` or `drop` system messages.
        concurrency: Maximum number of concurrent requests, one conversation each; the server batches them.
        timeout_s: Time limit of an attempt, seconds, from connecting to the last byte of the reply.
        retries: Further attempts after a broken connection or a server error.
        backoff_s: Pause before the second attempt, seconds; doubled before each further attempt.
        api_key_env: Environment variable with a key that is sent as a bearer token; null for no key.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        score_at: Where the score is read: `last`, the conversation's last token, whatever it is; `eos`, the EOS that
            the template writes after the response; `before_eos`, the token before that. vLLM reads the last token of
            a request, so later tokens are not sent. null for the value in the config beside the tokenizer
            (`score_at`, in models trained here), else `last`, with a warning if transformers reads elsewhere.
        mean_score: Subtracted from every score, reward units; null for the value in the config beside the tokenizer
            (`bias`, which `data.center_on` of the reward model's training writes), else 0.
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
        score_at: ScoreAt | None = None,
        mean_score: float | None = None,
    ) -> None:
        check_finite_numbers("rollout.reward", mean_score=mean_score)
        if max_tokens < 2:
            raise InputError(f"`rollout.reward.max_tokens` must be 2 or more, got {max_tokens}.")
        self.url, self.model, self.endpoint = url, model or tokenizer, endpoint
        self.max_tokens, self.system_prompt = max_tokens, system_prompt
        self._source = ModelSource(tokenizer, None, chat_template, False, "rollout.reward.tokenizer")
        address = f"{url.rstrip('/')}/{endpoint}"
        self._service = Service(address, timeout_s, retries, backoff_s, concurrency, api_key_env)
        self._score_at, self._given_mean = score_at, mean_score
        self._renderer: Renderer | None = None

    @property
    def name(self) -> str:
        return f"VLLMServerReward({self.model})"

    def renderer(self) -> Renderer:
        """The renderer of conversations for the model."""
        if self._renderer is None:
            self._renderer = reward_renderer(self._source, self.max_tokens, self.system_prompt, score_at=self._score_at)
        return self._renderer

    def fingerprint(self) -> str:
        place, mean = self.renderer().score_at, self._mean
        return describe(self) + ("" if place == "last" and mean == 0 else f":{place}:{mean}")

    @cached_property
    def _mean(self) -> float:
        """The mean score, which the server does not subtract."""
        if self._given_mean is not None:
            return self._given_mean
        return mean_score(stored_config(self._source), self._source.path)

    def check(self, samples: Sequence[Sample]) -> None:
        super().check(samples)
        warn_about_open_servers([self.url])
        report_mean_score(self._mean, self._source.path)
        if self._score_at is None:
            warn_if_read_elsewhere(self.renderer(), self._source)
        self._check_rotary()
        for sample in samples:
            sample.rendered(self.renderer())

    def _check_rotary(self) -> None:
        """Check that vLLM, which has one set of rotary factors for all rows, computes the factors of each row's length.

        Raises:
            InputError: The factors of some rows could differ.
        """
        limits = thresholds(self._source.config)
        reply = self._service.get_json(f"{self.url.rstrip('/')}/v1/models") if limits else None
        models = reply.get("data") if isinstance(reply, Mapping) else None
        max_model_len = models[0].get("max_model_len") if isinstance(models, list) and models else None
        if "longrope" in limits and (max_model_len or 0) > (limit := limits["longrope"]):
            raise InputError(
                f"`rollout.reward.url`: the server runs with --max-model-len {max_model_len}, over {limit}, so vLLM "
                f"uses the long rotary factors of {self.model!r} for every row, even up to {limit} tokens. Start it "
                f"with --max-model-len {limit}, or score in this process (ClassifierReward)."
            )
        if "longrope" in limits:
            expected, found = longrope_scales(self._source.config, limits["longrope"])
            if abs(expected - found) > 1e-4 * expected:
                raise InputError(
                    f"`rollout.reward.url`: vLLM multiplies the longrope embeddings of {self.model!r} by {found:.4g}, "
                    f"and transformers by {expected:.4g} (factor, attention_factor and mscales of its config). Score "
                    "in this process (ClassifierReward)."
                )
        if "dynamic" in limits and self.max_tokens > (limit := limits["dynamic"]):
            raise InputError(
                f"`rollout.reward.max_tokens` is {self.max_tokens}: vLLM does not adapt the dynamic rotary factors "
                f"of {self.model!r} to rows of over {limit} tokens. Set it to {limit} at most, or score in "
                "this process (ClassifierReward)."
            )

    def score(self, batch: Sequence[Sample]) -> list[RewardResult | Failure]:
        rows = [s.rendered(self.renderer()) for s in batch]
        task = {"task": "classify"} if self.endpoint == "pooling" else {}
        payloads = [{"model": self.model, "input": [row.ids], "use_activation": False, **task} for row in rows]
        scores = self._service.map(payloads, lambda i, body: _read_score(body))
        return [
            s if isinstance(s, Failure) else RewardResult(s - self._mean, truncated_tokens=row.truncated_tokens)
            for s, row in zip(scores, rows, strict=True)
        ]


def _read_score(body: Any) -> float:
    """The score in a reply of `/classify` or `/pooling`."""
    data = body.get("data") if isinstance(body, Mapping) else None
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], Mapping):
        raise InvalidReplyError('expected an object with one entry under "data"')
    values: Any = data[0].get("probs", data[0].get("data"))
    while isinstance(values, list) and values and isinstance(values[-1], list):
        values = values[-1]
    if not isinstance(values, list):
        raise InvalidReplyError("expected a list of scores")
    if len(values) != 1 and "probs" in data[0]:
        raise InvalidReplyError(f"the model has {len(values)} labels; a reward model has 1")
    if not values:
        raise InvalidReplyError("the list of scores is empty")
    return parse_number(values[-1], "the score")
