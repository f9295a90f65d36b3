"""Reward models with one output: loaded with their head or not at all, and run as one unit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.classifier_head import empty_classifier, find_head, has_head, is_of_head
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.load_whole import TOLD, load_whole, refuse_gaps, refuse_not_finite
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.policy import train_in_eval_mode, without_autocast, without_dropout, working_copy
from rlhf_pl.models.pretrained_files import WeightFiles, stored_config
from rlhf_pl.models.rotary import row_positions, steady_rotary, thresholds
from rlhf_pl.models.score_position import forget_mean, mean_score
from rlhf_pl.models.shared_prefix import hidden_states, share_prompts
from rlhf_pl.models.source import ModelSource


def load_classifier(
    source: ModelSource,
    weights: ModelSource | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
) -> Any:
    """The reward model of `source` with all its weights and one output, dropout off, in eval mode.

    Args:
        source: Config and tokenizer.
        weights: Where the weights are, if not in `source`.
        dtype: Of the weights; None for that of the checkpoint.
        attn_implementation: Attention of transformers.

    Raises:
        InputError: The head or other weights are missing, or there is more than one label.
    """
    from transformers import AutoModelForSequenceClassification

    weights = weights or source
    files = WeightFiles(weights)
    rename = find_head(source, files).rename
    if rename is None and weights is not source:  # it may come without the config that transformers looks for
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
        model, info = kind.from_pretrained(None, state_dict=state, dtype=dtype, **arguments, **TOLD)
        refuse_gaps(weights, model, info)
        if bias is not None:  # transformers' own head has none
            model.score.bias = nn.Parameter(bias.view(1).to(dtype))
    return model.eval()


def new_classifier(
    source: ModelSource, seed: int, dtype: torch.dtype | None = None, attn_implementation: str = "sdpa"
) -> Any:
    """A classifier with one output on the backbone of `source`; a head that is there is kept, else it is drawn.

    A mean in the config is left out: it is not that of the scores that training will give.

    Args:
        source: A causal LM or a reward model.
        seed: Of the head.
        dtype: Of the weights; None for that of the checkpoint.
        attn_implementation: Attention of transformers.
    """
    from transformers import AutoModelForSequenceClassification

    if has_head(source):
        model = load_classifier(source, None, dtype, attn_implementation)
        refuse_not_finite(model, source)
        forget_mean(model.config)
        return model
    config = without_dropout(source.config)
    config.num_labels = 1
    forget_mean(config)
    model = load_whole(
        source,
        AutoModelForSequenceClassification,
        is_of_head,
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
            # small, so that training starts near equal scores (as in arXiv:2009.01325)
            std = (parameter.shape[-1] + 1) ** -0.5 if parameter.dim() > 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    refuse_not_finite(model, source)
    return model.eval()


class ClassifierLM(nn.Module):
    """A classifier as one unit: token ids in, one score a row out.

    Where the head is one linear layer on the last token's hidden state, the score is read at the last token of a row,
    found by the row's length, whatever that token is, and the layer is computed in the dtype of its weights, autocast
    aside: bf16 scores near 10 would be steps of 0.06. Other heads, such as those of encoders, are the model's own. The
    mean that a config names as `bias` is subtracted.

    Args:
        model: A Hugging Face sequence classifier with one output.
        compute: Where and how it computes; None for where the model is.
    """

    def __init__(self, model: Any, compute: Compute | None = None) -> None:
        super().__init__()
        compute = compute or Compute(model.device)
        self.model, self.compute = model, compute
        self.copy = working_copy(model, compute)
        self.by_row = bool(thresholds(model.config))
        steady_rotary(model, model.config)
        self.head_name = _linear_head(model)
        self.mean = mean_score(model.config)
        self.linear = self.head_name is not None
        # what is padding is told by the mask; heads of the model's own may look for its token
        self.pad_id = 0 if self.linear else _padding_taken(model)
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
        """Scores of rows that are padded with `pad_id` on either side, or of what `tree_inputs` gives.

        Args:
            input_ids: Shape (R, T), int64; of trees (1, N).
            attention_mask: 1 at tokens, shape (R, T); of trees None.
            position_ids: Of trees, shape (1, N).
            last: Of trees the place where each answer's score is read, shape (R,).
            layout: Where trees lie.
            inputs: Others that the architecture takes of rows, such as `token_type_ids`, shape (R, T).

        Returns:
            Shape (R,), float32.
        """
        model = self.model if self.copy is None else self.copy.twin()
        with without_autocast(input_ids.device, self.compute):
            if layout is not None:
                assert position_ids is not None
                assert last is not None
                hidden = hidden_states(model, input_ids, position_ids, layout).index_select(0, last)
                return self._head(hidden) - self.mean
            assert attention_mask is not None
            order = (attention_mask == 0).long().argsort(dim=-1, stable=True)  # so that positions count tokens alone
            rows = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
            rows = {name: tensor.gather(1, order) for name, tensor in rows.items()}
            if self.by_row:
                rows["position_ids"] = row_positions(rows["attention_mask"])
            return (self._of_rows(model, **rows) if self.linear else self._own(model, **rows)) - self.mean

    def _of_rows(self, model: Any, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Scores at the last tokens of rows that are padded on the right."""
        hidden = model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs
        ).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        return self._head(hidden[rows, attention_mask.sum(-1) - 1])

    def _own(self, model: Any, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Scores by the head of the model's own, row by row if it minds padding; padded on the right."""
        if self.pad_id is None and len(input_ids) > 1:
            rows = []
            for row, mask in enumerate(attention_mask.bool()):
                alone = {name: tensor[row][mask][None] for name, tensor in inputs.items()}
                ids = input_ids[row][mask][None]
                rows.append(self._own(model, ids, torch.ones_like(ids), **alone))
            return torch.cat(rows)
        return model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits[:, 0].float()

    def _head(self, hidden: Tensor) -> Tensor:
        """Shape (R, H) to (R,), float32."""
        head = getattr(self.model, self.head_name or "")
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.weight.dtype))[:, 0].float()


def tree_inputs(trees: Sequence[PrefixGroup]) -> dict[str, Any]:
    """What `ClassifierLM.forward` takes of conversations that share their beginnings, where it `shares_prompts`.

    Args:
        trees: What conversations have in common, with the rest of each, one token at least.
    """
    last: list[int] = []
    end = 0
    for tree in trees:
        end += len(tree.prompt)
        for answer in tree.answers:
            end += len(answer)
            last.append(end - 1)
    rows = pack(trees)
    return {
        "input_ids": rows.input_ids,
        "position_ids": rows.position_ids,
        "last": torch.tensor(last),
        "layout": rows.layout,
    }


@torch.no_grad()
def _linear_head(model: Any) -> str | None:
    """The name of the linear layer that makes the model's score of the last token's hidden state, tried on a few ids.

    None where the score is made otherwise.
    """
    ids = _ids_to_try(model)
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
def _padding_taken(model: Any) -> int | None:
    """The padding token of a model whose scores do not change with padding on the right; None if it has none such."""
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None or not 0 <= pad_id < model.get_input_embeddings().weight.shape[0]:
        return None
    ids = _ids_to_try(model)
    longer = torch.cat([ids, torch.full_like(ids[:, :3], pad_id)], dim=1)
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    beside = model(input_ids=longer, attention_mask=(torch.arange(longer.shape[1]) < ids.shape[1]).long()[None])
    same = torch.allclose(alone.float(), beside.logits.float(), rtol=1e-3, atol=1e-3)
    return pad_id if same else None


def _ids_to_try(model: Any) -> Tensor:
    config = model.config.get_text_config()
    ids = torch.tensor([[i for i in range(1, 12) if i != config.pad_token_id][:6]], device=model.device)
    return ids % config.vocab_size
