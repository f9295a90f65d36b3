"""Reward models with one output as rewards."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.classifier_head import check_classifier
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.liger import apply_liger
from rlhf_pl.models.load_whole import refuse_not_finite
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.pretrained_files import WeightFiles, stored_config
from rlhf_pl.models.rendering import Rendered, Renderer, SystemPrompt, padded, reward_renderer
from rlhf_pl.models.score_position import ScoreAt, mean_score, reads_elsewhere, warn_of_other_reading
from rlhf_pl.models.sequence_classifier import ClassifierLM, load_classifier, tree_inputs
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards.base import Reward, RewardResult, Sample
from rlhf_pl.rewards.families import Family, families
from rlhf_pl.rewards.local_model import LocalModel, ModelDType
from rlhf_pl.utils.devices import fast_dtype
from rlhf_pl.utils.fingerprints import describe


class ClassifierReward(Reward):
    """A sequence-classification reward model with one label, of any architecture that transformers knows.

    The conversation is rendered with the reward model's own tokenizer and chat template. Heads under the names that
    TRL, OpenRLHF, DeepSpeed-Chat, Starling and CleanRL use are understood too. A head that the checkpoint does not
    fill is an error.

    Args:
        model: Model folder or Hub id.
        base: Where config and tokenizer come from, if `model` brings weights alone, as Starling-RM does.
        dtype: Of the weights; null for that of the checkpoint; float32 on CPUs without instructions for bfloat16.
        device: `auto` for the GPU where there is one, `cpu`, `cuda:1`, ...
        max_tokens: Longer conversations are cut from the left of the prompt, and counted.
        tokens_per_batch: Padded tokens of a batch; rows of like length go together.
        system_prompt: `keep` or `drop` system messages.
        pair_encoding: Give prompt and answer as a pair of texts, for encoders without a chat template.
        offload: Keep the weights on the CPU while the policy trains.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        attn_implementation: Attention of transformers.
        use_liger_kernel: Norms, MLPs and rotary embeddings by liger-kernel: less memory and time on GPUs. null for
            wherever a GPU, the package and kernels for the architecture are there and give what plain layers give,
            true to require it (an error without a GPU).
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run Python code that comes with the model. Off unless you trust its authors.
        score_at: Where the score is read: `last`, the conversation's last token, whatever it is; `eos`, the EOS that
            the template writes after the answer; `before_eos`, the token before that. null for what the model's config
            says (`score_at`, in models trained here), else `last`, with a warning where transformers' own classifier
            reads elsewhere.
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
    ) -> None:
        self.weights = ModelSource(model, revision, chat_template, trust_remote_code, "rollout.reward.model")
        self.source = self.weights
        if base is not None:
            self.source = ModelSource(base, None, chat_template, trust_remote_code, "rollout.reward.base")
        self.model, self.base, self.dtype = model, base, dtype
        self.max_tokens, self.system_prompt, self.pair_encoding = max_tokens, system_prompt, pair_encoding
        self.chat_template, self.attn_implementation, self.revision = chat_template, attn_implementation, revision
        self.use_liger_kernel = use_liger_kernel
        self._score_at = score_at
        self._renderer: Renderer | None = None
        self._local = LocalModel(self._load, _run, device, tokens_per_batch, offload)

    @property
    def name(self) -> str:
        return f"ClassifierReward({self.model})"

    def fingerprint(self) -> str:
        return f"{describe(self)}:{self._weights_hash}{self._reading}"

    @cached_property
    def _reading(self) -> str:
        """What is not as it always was for every model."""
        place, mean = self.renderer().score_at, self._mean
        plain = place == "last" and mean == 0 and not reads_elsewhere(self.renderer().ending, self.source)
        return "" if plain else f":{place}:{mean}"

    @cached_property
    def _mean(self) -> float:
        return mean_score(stored_config(self.weights), self.model) or mean_score(self.source.config, self.base or "")

    @cached_property
    def _weights_hash(self) -> str:
        return WeightFiles(self.weights).fingerprint()

    def renderer(self) -> Renderer:
        """Renders conversations as the model reads them."""
        if self._renderer is None:
            limit = min(self.max_tokens, self.source.max_context_tokens)
            self._renderer = reward_renderer(
                self.source, limit, self.system_prompt, self.pair_encoding, self._score_at, "rollout.reward.model"
            )
        return self._renderer

    def check(self, samples: Sequence[Sample]) -> None:
        check_classifier(self.source, self.weights)
        _ = self._mean
        if self._score_at is None:
            warn_of_other_reading(self.renderer(), self.source)
        self._rows(samples)

    def _rows(self, samples: Sequence[Sample]) -> list[Rendered]:
        rows = [s.rendered(self.renderer()) for s in samples]
        named = ((sample.prompt_id, row.ids) for sample, row in zip(samples, rows, strict=True))
        self.source.check_ids(named, self.source.option)
        return rows

    def score(self, batch: Sequence[Sample]) -> list[RewardResult]:
        rows = self._rows(batch)
        scores = [
            score for scores in self._local(families(batch, rows, self.source.config)) for score in scores.tolist()
        ]
        return [
            RewardResult(score, truncated_tokens=row.truncated_tokens) for score, row in zip(scores, rows, strict=True)
        ]

    def open(self) -> None:
        self._local.open()

    def release_gpu(self) -> None:
        self._local.release_gpu()

    def close(self) -> None:
        self._local.close()

    def _load(self) -> nn.Module:
        name = fast_dtype(self.dtype, self._local.device.type)
        dtype = None if name is None else getattr(torch, name)
        model = load_classifier(self.source, self.weights, dtype, self.attn_implementation)
        refuse_not_finite(model, self.weights)
        compute = Compute(self._local.device)
        apply_liger(model, compute, self.use_liger_kernel, self.source.option)
        return ClassifierLM(model, compute)


def _run(module: Any, found: list[Family], device: torch.device) -> list[Tensor]:
    """The scores of each family."""
    rows = [row for family in found for row in family.rows]
    if module.shares_prompts and not any(row.token_type_ids for row in rows):
        inputs = tree_inputs([family.tree for family in found])
        scores = module(**{n: v.to(device) if isinstance(v, Tensor | Layout) else v for n, v in inputs.items()})
    else:
        scores = module(**padded(rows, module.pad_id or 0, device))
    return list(scores.split([len(family.rows) for family in found]))
