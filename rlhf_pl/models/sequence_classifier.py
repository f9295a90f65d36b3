"""Reward models with one output: loading, and the module that computes scores."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.classifier_head import empty_classifier, find_head, has_head, is_head_tensor
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.load_whole import LOADING_INFO, check_finite, check_loading_info, load_whole
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.policy import train_in_eval_mode, without_autocast, without_dropout, working_copy
from rlhf_pl.models.pretrained_files import WeightFiles, stored_config
from rlhf_pl.models.rotary import row_positions, stabilize_rotary, thresholds
from rlhf_pl.models.score_position import mean_score, remove_mean_score
from rlhf_pl.models.shared_prefix import hidden_states, share_prompts
from rlhf_pl.models.source import ModelSource


def load_classifier(
    source: ModelSource,
    weights: ModelSource | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
) -> Any:
    """Load the reward model of `source` with all its weights and one output, without dropout, in eval mode.

    Args:
        source: Config and tokenizer.
        weights: Location of the weights, if not `source`.
        dtype: Dtype of the weights; None for that of the checkpoint.
        attn_implementation: Attention implementation of transformers.

    Raises:
        InputError: The head or other weights are missing, or there is more than one label.
    """
    from transformers import AutoModelForSequenceClassification

    weights = weights or source
    files = WeightFiles(weights)
    rename = find_head(source, files).rename
    if rename is None and weights is not source:  # its folder may lack the config that transformers needs
        rename = {name: name for name in files.shapes}
    config = without_dropout(source.config)
    config.num_labels = 1
    if mean := mean_score(stored_config(weights), weights.path):
        config.bias = mean
    arguments = {"config": config, "attn_implementation": attn_implementation}
    if rename is None:
        model = load_whole(weights, AutoModelForSequenceClassification, **arguments, dtype=dtype or "auto")
    else:
        state = {rename[name]: tensor for name, tensor in files.tensors(rename).items()}
        dtype = dtype or next(iter(state.values())).dtype
        if "score.weight" in state:
            state["score.weight"] = state["score.weight"].view(1, -1)
        bias = state.pop("score.bias", None)
        kind = type(empty_classifier(source))
        model, info = kind.from_pretrained(None, state_dict=state, dtype=dtype, **arguments, **LOADING_INFO)
        check_loading_info(weights, model, info)
        if bias is not None:  # transformers' own head has no bias
            model.score.bias = nn.Parameter(bias.view(1).to(dtype))
    return model.eval()


def new_classifier(
    source: ModelSource, seed: int, dtype: torch.dtype | None = None, attn_implementation: str = "sdpa"
) -> Any:
    """Load a classifier with one output on the backbone of `source`; a missing head is initialised at random.

    A mean score in the config is removed: the scores after training will have another mean.

    Args:
        source: A causal LM or a reward model.
        seed: Seed of the head.
        dtype: Dtype of the weights; None for that of the checkpoint.
        attn_implementation: Attention implementation of transformers.
    """
    from transformers import AutoModelForSequenceClassification

    if has_head(source):
        model = load_classifier(source, None, dtype, attn_implementation)
        check_finite(model, source)
        remove_mean_score(model.config)
        return model
    config = without_dropout(source.config)
    config.num_labels = 1
    remove_mean_score(config)
    model = load_whole(
        source,
        AutoModelForSequenceClassification,
        is_head_tensor,
        config=config,
        dtype=dtype or "auto",
        attn_implementation=attn_implementation,
    )
    prefix = model.base_model_prefix + "."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(prefix):
                continue
            # small, so that training starts with almost equal scores (as in arXiv:2009.01325)
            std = (parameter.shape[-1] + 1) ** -0.5 if parameter.dim() > 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    check_finite(model, source)
    return model.eval()


class ClassifierLM(nn.Module):
    """A classifier as one module that maps token ids to one score per row.

    If the head is one linear layer on the last token's hidden state, the score is read at the last token of a row,
    found by the row's length and independent of the token's id. The layer computes in the dtype of its weights, without
    autocast: bf16 scores near 10 have steps of 0.06. Other heads, for example those of encoders, run as in the model.
    The mean score that a config gives as `bias` is subtracted.

    Args:
        model: A Hugging Face sequence classifier with one output.
        compute: Device and dtypes of the computation; None for those of the model.
    """

    def __init__(self, model: Any, compute: Compute | None = None) -> None:
        super().__init__()
        compute = compute or Compute(model.device)
        self.model, self.compute = model, compute
        self.copy = working_copy(model, compute)
        self.has_row_factors = bool(thresholds(model.config))
        stabilize_rotary(model, model.config)
        self.head_name = find_linear_head(model)
        self.mean = mean_score(model.config)
        self.linear = self.head_name is not None
        # the mask marks padding, but the model's own head may look for the padding token
        self.pad_id = 0 if self.linear else _find_ignored_padding(model)
        self.shares_prompts = self.linear and share_prompts(model, compute)

    def train(self, mode: bool = True) -> "ClassifierLM":
        """See `train_in_eval_mode`."""
        return train_in_eval_mode(self, mode)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        last: Tensor | None = None,
        layout: Layout | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Scores of rows that are padded with `pad_id` on either side, or of the inputs of `prefix_group_inputs`.

        Args:
            input_ids: Shape (R, T), int64; (1, N) for prefix groups.
            attention_mask: 1 at tokens, shape (R, T); None for prefix groups.
            position_ids: Only for prefix groups: shape (1, N).
            last: Only for prefix groups: index of the token at which each response's score is read, shape (R,).
            layout: Only for prefix groups: their lengths.
            inputs: Further inputs of the architecture for rows, for example `token_type_ids`, shape (R, T).

        Returns:
            Shape (R,), float32.
        """
        model = self.model if self.copy is None else self.copy.prepare_module()
        with without_autocast(input_ids.device, self.compute):
            if layout is not None:
                assert position_ids is not None
                assert last is not None
                hidden = hidden_states(model, input_ids, position_ids, layout).index_select(0, last)
                return self._apply_head(hidden) - self.mean
            assert attention_mask is not None
            # move padding to the right, so that positions count only tokens
            order = (attention_mask == 0).long().argsort(dim=-1, stable=True)
            rows = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
            rows = {name: tensor.gather(1, order) for name, tensor in rows.items()}
            if self.has_row_factors:
                rows["position_ids"] = row_positions(rows["attention_mask"])
            return (
                self._score_rows(model, **rows) if self.linear else self._score_by_own_head(model, **rows)
            ) - self.mean

    def _score_rows(self, model: Any, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Scores at the last tokens of right-padded rows."""
        hidden = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs
        ).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        return self._apply_head(hidden[rows, attention_mask.sum(-1) - 1])

    def _score_by_own_head(self, model: Any, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Scores of right-padded rows by the model's own head; row by row if its scores depend on padding."""
        if self.pad_id is None and len(input_ids) > 1:
            rows = []
            for row, mask in enumerate(attention_mask.bool()):
                others = {name: tensor[row][mask][None] for name, tensor in inputs.items()}
                ids = input_ids[row][mask][None]
                rows.append(self._score_by_own_head(model, ids, torch.ones_like(ids), **others))
            return torch.cat(rows)
        return model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits[:, 0].float()

    def _apply_head(self, hidden: Tensor) -> Tensor:
        """Apply the head to hidden states, shape (R, H) to (R,), float32."""
        head = getattr(self.model, self.head_name or "")
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.weight.dtype))[:, 0].float()


def prefix_group_inputs(groups: Sequence[PrefixGroup]) -> dict[str, Any]:
    """The inputs of `ClassifierLM.forward` for conversations with common prefixes, if it `shares_prompts`.

    Args:
        groups: The common prefixes of conversations, with the rest of each, at least one token.
    """
    last: list[int] = []
    end = 0
    for group in groups:
        end += len(group.prompt)
        for response in group.responses:
            end += len(response)
            last.append(end - 1)
    rows = pack(groups)
    return {
        "input_ids": rows.input_ids,
        "position_ids": rows.position_ids,
        "last": torch.tensor(last),
        "layout": rows.layout,
    }


@torch.no_grad()
def find_linear_head(model: Any) -> str | None:
    """The name of the linear layer that computes the model's score from the last token's hidden state.

    Found by comparing scores of a few ids. None if the score is computed differently.
    """
    ids = _make_test_ids(model)
    expected = model(input_ids=ids).logits[0, 0].float()
    hidden = getattr(model.base_model(input_ids=ids), "last_hidden_state", None)
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if hidden is None or not isinstance(head, nn.Linear) or head.in_features != hidden.shape[-1]:
            continue
        if torch.allclose(head(hidden[0, -1])[0].float(), expected, rtol=1e-3, atol=1e-3):
            return name
    return None


@torch.no_grad()
def _find_ignored_padding(model: Any) -> int | None:
    """The padding token, if padding on the right does not change the model's scores; otherwise None."""
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None or not 0 <= pad_id < model.get_input_embeddings().weight.shape[0]:
        return None
    ids = _make_test_ids(model)
    longer = torch.cat([ids, torch.full_like(ids[:, :3], pad_id)], dim=1)
    scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    scores_with_padding = model(
        input_ids=longer, attention_mask=(torch.arange(longer.shape[1]) < ids.shape[1]).long()[None]
    )
    same = torch.allclose(scores.float(), scores_with_padding.logits.float(), rtol=1e-3, atol=1e-3)
    return pad_id if same else None


def _make_test_ids(model: Any) -> Tensor:
    config = model.config.get_text_config()
    ids = torch.tensor([[i for i in range(1, 12) if i != config.pad_token_id][:6]], device=model.device)
    return ids % config.vocab_size
