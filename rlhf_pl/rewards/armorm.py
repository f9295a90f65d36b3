"""ArmoRM (arXiv:2406.12845) as a reward, without the remote code that its checkpoint asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.liger import apply_liger
from rlhf_pl.models.load_whole import check_whole, load_whole
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import without_dropout
from rlhf_pl.models.pretrained_files import WeightFiles
from rlhf_pl.models.rendering import Rendered, Renderer, SystemPrompt, padded, reward_tokenizer
from rlhf_pl.models.rotary import row_positions, steady_rotary, thresholds
from rlhf_pl.models.shared_prefix import hidden_states, share_prompts
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rewards.base import Reward, RewardResult, Sample
from rlhf_pl.rewards.families import Family, families
from rlhf_pl.rewards.local_model import LocalModel, ModelDType
from rlhf_pl.utils.devices import fast_dtype
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import describe

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

    def score_trees(
        self, trees: Sequence[PrefixGroup], gating_positions: Sequence[int], device: torch.device
    ) -> ArmoRMOutput:
        """Scores of conversations that share their beginnings, which are computed once; needs `shares_prompts`.

        Args:
            trees: What conversations have in common, with the rest of each.
            gating_positions: Where g is read, counted from the start of each conversation.
            device: Where the model is.
        """
        last, gate = [], []
        positions = iter(gating_positions)
        start = 0
        for tree in trees:
            end = start + len(tree.prompt)
            for answer in tree.answers:
                place = next(positions)
                gate.append(start + place if place < len(tree.prompt) else end + place - len(tree.prompt))
                end += len(answer)
                last.append(end - 1)
            start = end
        rows = pack(trees).to(device)
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


class ArmoRMReward(Reward):
    """`RLHFlow/ArmoRM-Llama3-8B-v0.1` and checkpoints of its layout, loaded natively.

    The reward is the gated score. Components are the 19 objectives under their published names. `objectives` chooses
    or re-weights them: the reward is then the weighted sum of what these objectives contribute to the score (`gated`),
    or of the objectives themselves.

    Args:
        model: Model folder or Hub id.
        objectives: Weights by objective, such as `{helpsteer-correctness: 1.0}`; null for the published score.
        gated: With `objectives`: weigh their gated contributions (true) or the objectives themselves (false).
        dtype: Of the backbone; null for that of the checkpoint. The heads are computed in float32.
        device: `auto` for the GPU where there is one, `cpu`, `cuda:1`, ...
        max_tokens: Longer conversations are cut from the left of the prompt, and counted.
        tokens_per_batch: Padded tokens of a batch; rows of like length go together.
        system_prompt: `keep` or `drop` system messages.
        offload: Keep the weights on the CPU while the policy trains.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        attn_implementation: Attention of transformers.
        use_liger_kernel: Norms, MLPs and rotary embeddings by liger-kernel: less memory and time on GPUs. null for
            wherever a GPU, the package and kernels for the architecture are there and give what plain layers give,
            true to require it (an error without a GPU).
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
        self.source = ModelSource(model, revision, chat_template, False, "rollout.reward.model")
        self.model, self.dtype, self.gated = model, dtype, gated
        self.objectives = None if objectives is None else dict(objectives)
        unknown = [name for name in self.objectives or () if name not in OBJECTIVES]
        if unknown:
            raise InputError(
                f"`rollout.reward.objectives` names {', '.join(unknown)}; ArmoRM's are {', '.join(OBJECTIVES)}."
            )
        if self.objectives == {}:
            raise InputError("`rollout.reward.objectives` is empty; null gives the published score.")
        self.max_tokens, self.system_prompt = max_tokens, system_prompt
        self.chat_template, self.attn_implementation, self.revision = chat_template, attn_implementation, revision
        self.use_liger_kernel = use_liger_kernel
        self._renderer: Renderer | None = None
        self._local = LocalModel(self._load, _run, device, tokens_per_batch, offload)

    @property
    def name(self) -> str:
        return f"ArmoRMReward({self.model})"

    def fingerprint(self) -> str:
        return f"{describe(self)}:{self._weights_hash}"

    @cached_property
    def _weights_hash(self) -> str:
        return WeightFiles(self.source).fingerprint()

    def renderer(self) -> Renderer:
        """Renders conversations as the model reads them."""
        if self._renderer is None:
            limit = min(self.max_tokens, self.source.max_context_tokens)
            self._renderer = Renderer(reward_tokenizer(self.source, False), limit, self.system_prompt)
        return self._renderer

    def check(self, samples: Sequence[Sample]) -> None:
        from transformers import AutoModel

        _heads(self.source)
        check_whole(self.source, AutoModel)
        for sample in samples:
            self._row(sample)

    def _row(self, sample: Sample) -> Rendered:
        row = sample.rendered(self.renderer())
        if row.turn is None:
            raise InputError(
                f"`rollout.reward.model`: the chat template of {self.model!r} gives no text between prompt and answer, "
                "where the gate would be read."
            )
        if row.turn >= len(row):
            raise InputError(f"`rollout.reward.max_tokens` of {self.max_tokens} leaves no room for an answer.")
        self.source.check_ids([(sample.prompt_id, row.ids)], self.source.option)
        return row

    def score(self, batch: Sequence[Sample]) -> list[RewardResult]:
        rows = [self._row(s) for s in batch]
        if not rows:
            return []
        score, rewards, coefficients = torch.cat(self._local(families(batch, rows, self.source.config))).split(
            [1, len(OBJECTIVES), len(OBJECTIVES)], dim=-1
        )
        chosen = score[:, 0]
        if self.objectives is not None:
            weights = torch.tensor([self.objectives.get(name, 0.0) for name in OBJECTIVES])
            chosen = ((rewards * coefficients if self.gated else rewards) * weights).sum(-1)
        return [
            RewardResult(value, dict(zip(OBJECTIVES, parts, strict=True)), row.truncated_tokens)
            for value, parts, row in zip(chosen.tolist(), rewards.tolist(), rows, strict=True)
        ]

    def open(self) -> None:
        self._local.open()

    def release_gpu(self) -> None:
        self._local.release_gpu()

    def close(self) -> None:
        self._local.close()

    def _load(self) -> nn.Module:
        device = self._local.device
        dtype = fast_dtype(self.dtype, device.type)
        return load_armorm(self.source, dtype, self.attn_implementation, device, self.use_liger_kernel)


def _heads(source: ModelSource) -> dict[str, str]:
    """Our names of the heads' tensors by the checkpoint's, once config and files are seen to have them.

    Raises:
        InputError: They do not.
    """
    config = source.config
    keys = ("num_objectives", "gating_temperature", "gating_hidden_dim", "gating_n_hidden")
    if absent := [key for key in keys if not hasattr(config, key)]:
        raise InputError(
            f"`{source.option}`: the config of {source.path!r} has no {', '.join(absent)}; it is no ArmoRM. For a "
            "model with one output take ClassifierReward."
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

    names = _heads(source)
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
    steady_rotary(model.backbone, source.config)
    model.shares_prompts = share_prompts(model.backbone, compute)
    apply_liger(model.backbone, compute, use_liger_kernel, source.option)
    return model


def _run(module: Any, found: list[Family], device: torch.device) -> list[Tensor]:
    """Score, rewards and coefficients of each family's answers, shape (answers, 1 + 2 * objectives)."""
    rows = [row for family in found for row in family.rows]
    turns = [row.turn for row in rows]
    if module.shares_prompts:
        output = module.score_trees([family.tree for family in found], turns, device)
    else:
        output = module(**padded(rows, 0, device), gating_positions=torch.tensor(turns, device=device))
    every = torch.cat([output.score[:, None], output.rewards, output.coefficients], dim=-1)
    return list(every.split([len(family.rows) for family in found]))
