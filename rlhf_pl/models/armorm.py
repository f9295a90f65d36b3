"""ArmoRM (arXiv:2406.12845): the model, without the remote code that its checkpoint asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.liger import apply_liger
from rlhf_pl.models.load_whole import load_whole
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import without_dropout
from rlhf_pl.models.pretrained_files import WeightFiles
from rlhf_pl.models.rotary import row_positions, stabilize_rotary, thresholds
from rlhf_pl.models.shared_prefix import hidden_states, share_prompts
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError

# in the order of the regression layer's outputs, as the model card names them
OBJECTIVES = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)


@dataclass(frozen=True)
class ArmoRMOutput:
    """What ArmoRM says of R conversations, float32.

    Args:
        score: The gated score, shape (R,).
        rewards: The objectives, shape (R, objectives).
        coefficients: What the gate makes of each objective, shape (R, objectives): `score` is the sum over objectives
            of `rewards * coefficients`.
    """

    score: Tensor
    rewards: Tensor
    coefficients: Tensor


class ArmoRM(nn.Module):
    """The heads of ArmoRM on a decoder without its output head.

    With h the last token's hidden state and g the hidden state where the prompt ends (the first token of the text
    between it and the answer): rewards = regression_layer(h); gate = softmax(gating(g) / temperature) * logit_scale;
    score = sum(gate * (rewards @ reward_transform_matrix)).

    Args:
        backbone: A Hugging Face decoder.
        config: Its config, with `num_objectives`, `gating_temperature`, `gating_hidden_dim`, `gating_n_hidden`.
    """

    def __init__(self, backbone: Any, config: Any) -> None:
        super().__init__()
        self.backbone = backbone
        width, count = config.get_text_config().hidden_size, config.num_objectives
        widths = [width, *[config.gating_hidden_dim] * config.gating_n_hidden, count]
        self.regression_layer = nn.Linear(width, count, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.zeros(count, count))
        self.gating_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = float(config.gating_temperature)
        self.shares_prompts = False  # until the weights are there to try it with

    def forward(self, input_ids: Tensor, attention_mask: Tensor, gating_positions: Tensor) -> ArmoRMOutput:
        """Scores of rows that are padded on the right.

        Args:
            input_ids: Shape (R, T), int64.
            attention_mask: 1 at tokens, shape (R, T).
            gating_positions: Where g is read, shape (R,), int64.
        """
        positions = {"position_ids": row_positions(attention_mask)} if thresholds(self.backbone.config) else {}
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
        ).last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        return self.judge(states[rows, attention_mask.sum(-1) - 1], states[rows, gating_positions])

    def score_prefix_groups(
        self, groups: Sequence[PrefixGroup], gating_positions: Sequence[int], device: torch.device
    ) -> ArmoRMOutput:
        """Scores of conversations that share their beginnings, which are computed once; needs `shares_prompts`.

        Args:
            groups: What conversations have in common, with the rest of each.
            gating_positions: Where g is read, counted from the start of each conversation.
            device: Where the model is.
        """
        last, gate = [], []
        positions = iter(gating_positions)
        start = 0
        for group in groups:
            end = start + len(group.prompt)
            for response in group.responses:
                place = next(positions)
                gate.append(start + place if place < len(group.prompt) else end + place - len(group.prompt))
                end += len(response)
                last.append(end - 1)
            start = end
        rows = pack(groups).to(device)
        states = hidden_states(self.backbone, rows.input_ids, rows.position_ids, rows.layout)
        return self.judge(states[torch.tensor(last, device=device)], states[torch.tensor(gate, device=device)])

    def judge(self, last: Tensor, gate: Tensor) -> ArmoRMOutput:
        """The heads' output for h and g, each of shape (R, H).

        In float32: the heads are small, and bf16 scores would be steps of 1/256 of their size.
        """
        rewards = self.regression_layer(last.float())
        gate = gate.float()
        for i, layer in enumerate(self.gating_layers):
            gate = layer(gate if i == 0 else gate.relu())
        gate = (gate / self.temperature).softmax(-1) * self.logit_scale
        coefficients = gate @ self.reward_transform_matrix.T
        return ArmoRMOutput((gate * (rewards @ self.reward_transform_matrix)).sum(-1), rewards, coefficients)


def armorm_heads(source: ModelSource) -> dict[str, str]:
    """Our names of the heads' tensors by the checkpoint's, once config and files are seen to have them.

    Raises:
        InputError: They do not.
    """
    config = source.config
    keys = ("num_objectives", "gating_temperature", "gating_hidden_dim", "gating_n_hidden")
    if absent := [key for key in keys if not hasattr(config, key)]:
        raise InputError(
            f"`{source.option}`: the config of {source.path!r} has no {', '.join(absent)}; it is not an ArmoRM "
            "model. For a model with one output take ClassifierReward."
        )
    if config.num_objectives != len(OBJECTIVES):
        raise InputError(
            f"`{source.option}`: {source.path!r} has {config.num_objectives} objectives; ArmoRM has {len(OBJECTIVES)}."
        )
    layers = range(config.gating_n_hidden + 1)
    names = {f"gating.layers.{i}.{part}": f"gating_layers.{i}.{part}" for i in layers for part in ("weight", "bias")}
    names |= {"gating.logit_scale": "logit_scale"}
    names |= {name: name for name in ("regression_layer.weight", "reward_transform_matrix")}
    given = WeightFiles(source).shapes
    if missing := [name for name in names if name not in given]:
        raise InputError(f"`{source.option}`: {source.path!r} lacks ArmoRM's {', '.join(missing)}.")
    return names


def load_armorm(
    source: ModelSource,
    dtype: str | None = None,
    attn_implementation: str = "sdpa",
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    use_liger_kernel: bool | None = None,
) -> ArmoRM:
    """The ArmoRM of a checkpoint in the published layout, in eval mode, checked for what it will do on `device`.

    Raises:
        InputError: Tensors or config keys are missing, or shapes do not fit.
    """
    from transformers import AutoModel

    names = armorm_heads(source)
    backbone = load_whole(
        source,
        AutoModel,
        config=without_dropout(source.config),
        dtype="auto" if dtype is None else getattr(torch, dtype),
        attn_implementation=attn_implementation,
    )
    model = ArmoRM(backbone, source.config)
    heads = {names[name]: tensor.float() for name, tensor in WeightFiles(source).tensors(names).items()}
    own = model.state_dict()
    if wrong := [name for name, tensor in heads.items() if own[name].shape != tensor.shape]:
        raise InputError(
            f"`{source.option}`: {wrong[0]} of {source.path!r} has the shape {tuple(heads[wrong[0]].shape)}; its "
            f"config says {tuple(own[wrong[0]].shape)}."
        )
    model.load_state_dict(heads, strict=False)
    model.eval()
    compute = Compute(device)
    stabilize_rotary(model.backbone, source.config)
    model.shares_prompts = share_prompts(model.backbone, compute)
    apply_liger(model.backbone, compute, use_liger_kernel, source.option)
    return model
