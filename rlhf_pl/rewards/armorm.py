"""ArmoRM (arXiv:2406.12845) as a reward."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_pl.models.armorm import OBJECTIVES, ArmoRM, armorm_heads, load_armorm
from rlhf_pl.models.load_whole import check_whole
from rlhf_pl.models.rendering import Rendered, Renderer, SystemPrompt, pad_rows, reward_tokenizer
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards.base import RewardResult, Sample
from rlhf_pl.rewards.local_model import LocalModelReward, ModelDType
from rlhf_pl.rewards.response_groups import ResponseGroup
from rlhf_pl.utils.errors import InputError


class ArmoRMReward(LocalModelReward):
    """`RLHFlow/ArmoRM-Llama3-8B-v0.1` and checkpoints with its layout, loaded without remote code.

    The reward is the gated score. The components are the 19 objectives under their published names. With `objectives`,
    the reward is the weighted sum of the chosen objectives' contributions to the score (`gated`), or of the objectives
    themselves.

    Args:
        model: Model folder or Hub id.
        objectives: Weights by objective, for example `{helpsteer-correctness: 1.0}`; null for the published score.
        gated: With `objectives`: whether the weights apply to the gated contributions or to the objectives themselves.
        dtype: Data type of the backbone; null for the checkpoint's. The heads are computed in float32.
        device: `auto` (the GPU if there is one), `cpu`, `cuda:1`, ...
        max_tokens: Longer conversations are truncated on the left of the prompt, and counted.
        tokens_per_batch: Padded tokens per batch; rows of similar length are batched together.
        system_prompt: `keep` or `drop` system messages.
        offload: Whether the weights are kept on the CPU while the policy trains.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        attn_implementation: Attention implementation of transformers.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings, to save memory and time. null
            uses it if there is a GPU, the package is installed, and its kernels for the architecture match the plain
            layers; true requires it (an error without a GPU).
        revision: Branch, tag or commit of a Hub id.
    """

    def __init__(
        self,
        model: str = "RLHFlow/ArmoRM-Llama3-8B-v0.1",
        objectives: Mapping[str, float] | None = None,
        gated: bool = True,
        dtype: ModelDType | None = None,
        device: str = "auto",
        max_tokens: int = 4096,
        tokens_per_batch: int = 16384,
        system_prompt: SystemPrompt = "keep",
        offload: bool = True,
        chat_template: str | None = None,
        attn_implementation: str = "sdpa",
        use_liger_kernel: bool | None = None,
        revision: str | None = None,
    ) -> None:
        weights = ModelSource(model, revision, chat_template, False, "rollout.reward.model")
        super().__init__(
            weights,
            weights,
            dtype=dtype,
            device=device,
            max_tokens=max_tokens,
            tokens_per_batch=tokens_per_batch,
            system_prompt=system_prompt,
            offload=offload,
            attn_implementation=attn_implementation,
            use_liger_kernel=use_liger_kernel,
        )
        self.gated = gated
        self.objectives = None if objectives is None else dict(objectives)
        unknown = [name for name in self.objectives or () if name not in OBJECTIVES]
        if unknown:
            raise InputError(
                f"`rollout.reward.objectives` names {', '.join(unknown)}; the objectives of ArmoRM are "
                f"{', '.join(OBJECTIVES)}."
            )
        if self.objectives == {}:
            raise InputError("`rollout.reward.objectives` is empty; null gives the published score.")

    def make_renderer(self, max_tokens: int) -> Renderer:
        return Renderer(reward_tokenizer(self.source, False), max_tokens, self.system_prompt)

    def check(self, samples: Sequence[Sample]) -> None:
        from transformers import AutoModel

        armorm_heads(self.source)
        check_whole(self.source, AutoModel)
        for sample in samples:
            self._row(sample)

    def _row(self, sample: Sample) -> Rendered:
        row = sample.rendered(self.renderer())
        if row.turn is None:
            raise InputError(
                f"`rollout.reward.model`: the chat template of {self.model!r} writes no text between prompt and "
                "response, where the gate is read."
            )
        if row.turn >= len(row):
            raise InputError(f"`rollout.reward.max_tokens` of {self.max_tokens} leaves no room for a response.")
        self.source.check_ids([(sample.prompt_id, row.ids)], self.source.option)
        return row

    def score(self, batch: Sequence[Sample]) -> list[RewardResult]:
        rows = [self._row(s) for s in batch]
        if not rows:
            return []
        score, objectives, coefficients = torch.cat(self.run(batch, rows)).split(
            [1, len(OBJECTIVES), len(OBJECTIVES)], dim=-1
        )
        reward = score[:, 0]
        if self.objectives is not None:
            weights = torch.tensor([self.objectives.get(name, 0.0) for name in OBJECTIVES])
            reward = ((objectives * coefficients if self.gated else objectives) * weights).sum(-1)
        return [
            RewardResult(value, dict(zip(OBJECTIVES, parts, strict=True)), row.truncated_tokens)
            for value, parts, row in zip(reward.tolist(), objectives.tolist(), rows, strict=True)
        ]

    def load(self, dtype: str | None, device: torch.device) -> ArmoRM:
        return load_armorm(self.source, dtype, self.attn_implementation, device, self.use_liger_kernel)

    def forward(self, module: Any, groups: list[ResponseGroup], device: torch.device) -> list[Tensor]:
        """Score, rewards and coefficients of each group's responses, shape (responses, 1 + 2 * objectives)."""
        rows = [row for group in groups for row in group.rows]
        turns = [row.turn for row in rows]
        if module.shares_prompts:
            output = module.score_prefix_groups([group.prefix_group for group in groups], turns, device)
        else:
            output = module(**pad_rows(rows, 0, device), gating_positions=torch.tensor(turns, device=device))
        outputs = torch.cat([output.score[:, None], output.rewards, output.coefficients], dim=-1)
        return list(outputs.split([len(group.rows) for group in groups]))
