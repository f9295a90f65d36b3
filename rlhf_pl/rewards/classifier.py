"""Reward models with one output as rewards."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.models.classifier_head import check_classifier
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.liger import apply_liger
from rlhf_pl.models.load_whole import check_finite
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.pretrained_files import stored_config
from rlhf_pl.models.rendering import Rendered, Renderer, SystemPrompt, pad_rows, reward_renderer
from rlhf_pl.models.score_position import (
    ScoreAt,
    is_read_before_padding,
    mean_score,
    report_mean_score,
    warn_if_read_elsewhere,
    write_mean_score,
)
from rlhf_pl.models.sequence_classifier import ClassifierLM, load_classifier, prefix_group_inputs
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards.base import RewardResult, Sample
from rlhf_pl.rewards.local_model import LocalModelReward, ModelDType
from rlhf_pl.rewards.response_groups import ResponseGroup
from rlhf_pl.utils.errors import check_finite as check_finite_numbers


class ClassifierReward(LocalModelReward):
    """A sequence-classification reward model with one label, of any architecture that transformers supports.

    The conversation is rendered with the reward model's own tokenizer and chat template. Head names of
    TRL, OpenRLHF, DeepSpeed-Chat, Starling and CleanRL are supported. A head without weights in the checkpoint is an
    error.

    Args:
        model: Model folder or Hub id.
        base: Folder or Hub id of config and tokenizer, if `model` has only weights, as Starling-RM does.
        dtype: Data type of the weights; null for the checkpoint's; float32 on CPUs without bfloat16 instructions.
        device: `auto` (the GPU if there is one), `cpu`, `cuda:1`, ...
        max_tokens: Longer conversations are truncated on the left of the prompt, and counted.
        tokens_per_batch: Padded tokens per batch; rows of similar length are batched together.
        system_prompt: `keep` or `drop` system messages.
        pair_encoding: Whether prompt and response are encoded as a pair of texts, for encoders without a chat template.
        offload: Whether the weights are kept on the CPU while the policy trains.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        attn_implementation: Attention implementation of transformers.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings, to save memory and time. null
            uses it if there is a GPU, the package is installed, and its kernels for the architecture match the plain
            layers; true requires it (an error without a GPU).
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Whether Python code that comes with the model is run. Only set it if you trust its authors.
        score_at: Where the score is read: `last`, the conversation's last token, whatever it is; `eos`, the EOS that
            the template writes after the response; `before_eos`, the token before that. null for the value in the
            model's config (`score_at`, in models trained here), else `last`, with a warning if transformers' classifier
            reads elsewhere.
        mean_score: Subtracted from every score, reward units; null for the value in the model's config (`bias`, which
            `data.center_on` of the reward model's training writes), else 0.
    """

    def __init__(
        self,
        model: str,
        base: str | None = None,
        dtype: ModelDType | None = None,
        device: str = "auto",
        max_tokens: int = 4096,
        tokens_per_batch: int = 16384,
        system_prompt: SystemPrompt = "keep",
        pair_encoding: bool = False,
        offload: bool = True,
        chat_template: str | None = None,
        attn_implementation: str = "sdpa",
        use_liger_kernel: bool | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        score_at: ScoreAt | None = None,
        mean_score: float | None = None,
    ) -> None:
        check_finite_numbers("rollout.reward", mean_score=mean_score)
        weights = ModelSource(model, revision, chat_template, trust_remote_code, "rollout.reward.model")
        source = weights
        if base is not None:
            source = ModelSource(base, None, chat_template, trust_remote_code, "rollout.reward.base")
        super().__init__(
            weights,
            source,
            dtype=dtype,
            device=device,
            max_tokens=max_tokens,
            tokens_per_batch=tokens_per_batch,
            system_prompt=system_prompt,
            offload=offload,
            attn_implementation=attn_implementation,
            use_liger_kernel=use_liger_kernel,
        )
        self.base, self.pair_encoding, self._score_at = base, pair_encoding, score_at
        self._given_mean = mean_score

    def fingerprint(self) -> str:
        return super().fingerprint() + self._scoring_suffix

    @cached_property
    def _scoring_suffix(self) -> str:
        """Where the score is read and the subtracted mean; empty for the defaults, to keep older fingerprints valid."""
        place, mean = self.renderer().score_at, self._mean
        is_default = place == "last" and mean == 0 and not is_read_before_padding(self.renderer().ending, self.source)
        return "" if is_default else f":{place}:{mean}"

    @cached_property
    def _mean(self) -> float:
        """The mean score that is subtracted."""
        if self._given_mean is not None:
            return self._given_mean
        return mean_score(stored_config(self.weights), self.model) or mean_score(self.source.config, self.base or "")

    def make_renderer(self, max_tokens: int) -> Renderer:
        return reward_renderer(
            self.source, max_tokens, self.system_prompt, self.pair_encoding, self._score_at, "rollout.reward.model"
        )

    def check(self, samples: Sequence[Sample]) -> None:
        check_classifier(self.source, self.weights)
        report_mean_score(self._mean, self.weights.path)
        if self._score_at is None:
            warn_if_read_elsewhere(self.renderer(), self.source)
        self._rows(samples)

    def _rows(self, samples: Sequence[Sample]) -> list[Rendered]:
        rows = [s.rendered(self.renderer()) for s in samples]
        ids_by_prompt = ((sample.prompt_id, row.ids) for sample, row in zip(samples, rows, strict=True))
        self.source.check_ids(ids_by_prompt, self.source.option)
        return rows

    def score(self, batch: Sequence[Sample]) -> list[RewardResult]:
        rows = self._rows(batch)
        scores = [score for scores in self.run(batch, rows) for score in scores.tolist()]
        return [
            RewardResult(score, truncated_tokens=row.truncated_tokens) for score, row in zip(scores, rows, strict=True)
        ]

    def load(self, dtype: str | None, device: torch.device) -> ClassifierLM:
        torch_dtype = None if dtype is None else getattr(torch, dtype)
        model = load_classifier(self.source, self.weights, torch_dtype, self.attn_implementation)
        check_finite(model, self.weights)
        write_mean_score(model.config, self._mean)
        compute = Compute(device)
        apply_liger(model, compute, self.use_liger_kernel, self.source.option)
        return ClassifierLM(model, compute)

    def forward(self, module: Any, groups: list[ResponseGroup], device: torch.device) -> list[Tensor]:
        """The scores of each group."""
        rows = [row for group in groups for row in group.rows]
        if module.shares_prompts and not any(row.token_type_ids for row in rows):
            inputs = prefix_group_inputs([group.prefix_group for group in groups])
            scores = module(**{n: v.to(device) if isinstance(v, Tensor | Layout) else v for n, v in inputs.items()})
        else:
            scores = module(**pad_rows(rows, module.pad_id or 0, device))
        return list(scores.split([len(group.rows) for group in groups]))
