"""A sampler based on transformers alone: slow, and an independent check of the vLLM samplers."""

from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pl.models.policy import without_dropout
from rlhf_pl.models.rotary import stabilize_rotary, thresholds
from rlhf_pl.models.rounding import round_to
from rlhf_pl.models.shared_prefix import use_exact_attention
from rlhf_pl.rollout.base import EngineSpec, NamedTensors, PromptTokens, Response, Sampler, SamplingConfig


class TransformersSampler(Sampler):
    """Samples responses with `generate` of transformers, from a copy of the policy.

    Args:
        dtype: Dtype of the copy.
        batch_size: Responses sampled at a time.
    """

    def __init__(self, dtype: Literal["bfloat16", "float16", "float32"] = "float32", batch_size: int = 64) -> None:
        self.dtype = dtype
        self.batch_size = batch_size
        self._model: Any = None

    def start(self, spec: EngineSpec) -> None:
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._eos = torch.tensor(spec.source.eos_token_ids, device=device)
        with torch.random.fork_rng():  # `load_weights` replaces the random initial weights
            model = AutoModelForCausalLM.from_config(
                without_dropout(spec.source.config), dtype=getattr(torch, self.dtype)
            )
        self._model = model.to(device).eval()
        use_exact_attention(self._model)
        stabilize_rotary(self._model, spec.source.config, spec.max_model_tokens)
        if thresholds(spec.source.config):
            from transformers import GenerationMixin

            # Phi-3's own method drops the cache where the factors would change; here they never do
            prepare = GenerationMixin.prepare_inputs_for_generation
            self._model.prepare_inputs_for_generation = MethodType(prepare, self._model)

    def load_weights(self, tensors: NamedTensors) -> None:
        # a missing tensor stays NaN, which the check after a weight sync reports
        own = self._model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors:
                if name in own:
                    own[name].copy_(round_to(tensor, own[name].dtype))

    @torch.no_grad()
    def invalidate_weights(self, tensors: Mapping[str, Tensor]) -> None:
        for parameter in self._model.parameters():
            parameter.fill_(float("nan"))

    def readable_weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._model.state_dict().items())

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[PromptTokens], sampling: SamplingConfig
    ) -> Iterator[tuple[int, list[Response]]]:
        per_batch = max(1, self.batch_size // sampling.num_responses)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
        for start in range(0, len(by_length), per_batch):
            batch = by_length[start : start + per_batch]
            responses = self._sample([prompts[i] for i in batch], sampling)
            for position, index in enumerate(batch):
                first = position * sampling.num_responses
                yield index, responses[first : first + sampling.num_responses]

    def _sample(self, prompts: list[PromptTokens], sampling: SamplingConfig) -> list[Response]:
        from transformers import GenerationConfig, LogitsProcessorList

        rows = [(p.token_ids, p.seed + i) for p in prompts for i in range(sampling.num_responses)]
        width = max(len(ids) for ids, _ in rows)
        device = self._eos.device
        input_ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        attention_mask = torch.zeros_like(input_ids)
        for i, (ids, _) in enumerate(rows):  # left padding: the responses of all rows start at the same column
            input_ids[i, width - len(ids) :] = torch.tensor(ids, device=device)
            attention_mask[i, width - len(ids) :] = 1
        recorder = _RecordLogps(width) if any(p.logps for p in prompts) else None
        choose_token = _SeededSampling([seed for _, seed in rows], sampling)
        sequences = self._model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=sampling.max_response_tokens,
                eos_token_id=self._eos.tolist(),
                pad_token_id=int(self._eos[0]),
            ),
            logits_processor=LogitsProcessorList([choose_token] if recorder is None else [recorder, choose_token]),
        )
        sampled = sequences[:, width:]
        logps = sampled.new_zeros(len(sampled), 0) if recorder is None else recorder.finish(sequences)
        return [self._make_response(ids, row_logps) for ids, row_logps in zip(sampled, logps, strict=True)]

    def _make_response(self, ids: Tensor, logps: Tensor) -> Response:
        """A row up to its first EOS; the rest is padding."""
        ends = torch.isin(ids, self._eos).nonzero()
        length = int(ends[0]) + 1 if len(ends) else len(ids)
        return Response(ids[:length].tolist(), logps[:length].tolist(), finished=len(ends) > 0)

    def close(self) -> None:
        self._model = None


class _SeededSampling:
    """Turns greedy decoding into exact sampling with a separate random generator for every row.

    In each row, only the token at which the cumulative probability exceeds a random number keeps a finite score. One
    random number per token is faster than noise for the whole vocabulary, which would take longer than everything in a
    step but the model. With a generator per row, a response depends only on its seed, not on the batch.
    """

    def __init__(self, seeds: Sequence[int], sampling: SamplingConfig) -> None:
        from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.temperature = sampling.temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.warpers: list[Any] = []
        if sampling.top_k > 0:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            self.warpers.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.temperature == 0:
            return scores
        scores = scores.float() / self.temperature
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        cumulative = scores.softmax(-1).cpu().cumsum(-1, dtype=torch.float64)  # cumsum is not deterministic on GPUs
        uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        token.clamp_(max=scores.shape[-1] - 1)  # out of range if the scores are NaN
        return torch.full_like(scores, -torch.inf).scatter_(1, token.to(scores.device), 0.0)


class _RecordLogps:
    """Records the log-prob of each sampled token under the unmodified logits."""

    def __init__(self, prompt_width: int) -> None:
        self.prompt_width = prompt_width
        self.columns: list[Tensor] = []
        self.previous: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids)
        self.previous = scores.float().log_softmax(-1)
        return scores

    def _record(self, sequences: Tensor) -> None:
        if self.previous is not None:
            token = sequences[:, self.prompt_width + len(self.columns)]
            self.columns.append(self.previous.gather(-1, token.unsqueeze(-1)).squeeze(-1))

    def finish(self, sequences: Tensor) -> Tensor:
        """Log-probs of all sampled tokens, shape (rows, sampled tokens)."""
        self._record(sequences)
        return torch.stack(self.columns, dim=1)
