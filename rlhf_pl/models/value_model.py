"""Critics: the value of the state before each response token, by a classifier with one output."""

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.classifier_head import check_new_classifier, empty_classifier, has_head
from rlhf_pl.models.compute import Compute
from rlhf_pl.models.liger import apply_liger
from rlhf_pl.models.load_whole import check_finite
from rlhf_pl.models.lora import LoRA, adapter_targets, add_lora
from rlhf_pl.models.packed_layout import Layout
from rlhf_pl.models.policy import train_in_eval_mode, without_autocast, working_copy
from rlhf_pl.models.rotary import stabilize_rotary
from rlhf_pl.models.score_position import mean_score
from rlhf_pl.models.sequence_classifier import find_linear_head, load_classifier, new_classifier
from rlhf_pl.models.shared_prefix import share_prompts
from rlhf_pl.models.source import ModelSource
from rlhf_pl.models.target_states import target_states
from rlhf_pl.models.value_head import apply_value_head
from rlhf_pl.utils.errors import InputError

HEAD = "score"  # the name of the head in transformers' classifiers on causal backbones


class ValueLM(nn.Module):
    """A critic as one module that maps token ids to a value for every response token.

    The mean score that a reward model's config gives as `bias` is subtracted, as from its scores: a critic that starts
    from the reward model starts with the values that the rewards have.

    Args:
        model: A Hugging Face classifier with a linear head of one output on a causal backbone.
        compute: Device and dtypes of the computation.
    """

    def __init__(self, model: Any, compute: Compute = Compute()) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.model, self.compute = model, compute
        self.copy = working_copy(model, compute)
        self.mean = mean_score(model.config)

    def train(self, mode: bool = True) -> "ValueLM":
        """See `train_in_eval_mode`."""
        return train_in_eval_mode(self, mode)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logit_positions: Tensor,
        response_ids: Tensor,
        layout: Layout,
    ) -> Tensor:
        """Values of the states before the response tokens of a `PackedBatch`.

        Args:
            input_ids: See `PackedBatch` for this and the other tensors; shape (1, N).
            position_ids: Shape (1, N).
            logit_positions: Shape (M,).
            response_ids: Shape (M,).
            layout: Lengths of the prompts and responses.

        Returns:
            Shape (M,), float32, reward units.
        """
        model = self.model if self.copy is None else self.copy.prepare_module()
        with without_autocast(input_ids.device, self.compute):
            hidden = target_states(model, input_ids, position_ids, logit_positions, response_ids, layout)
        return apply_value_head(self.model.score, hidden) - self.mean


def check_critic(source: ModelSource, policy: ModelSource, longest: int | None, with_weights: bool) -> None:
    """Refuse a critic that can't be loaded, or that can't read what the policy writes, before any weights load.

    Args:
        source: The model that the critic starts from.
        policy: The policy.
        longest: Tokens of the run's longest prompt with its response; None if not known.
        with_weights: Whether to look at the weight files too.

    Raises:
        InputError: Names the option and what to do.
    """
    head = getattr(empty_classifier(source), HEAD, None)
    if not isinstance(head, nn.Linear):
        raise _head_error(source)
    _check_tokens(source, policy)
    if longest is not None and longest > source.max_context_tokens:
        raise InputError(
            f"`{source.option}`: {source.path!r} has {source.max_context_tokens} positions, but prompts and responses "
            f"may have {longest} tokens. Lower `data.max_prompt_tokens`, or choose another critic."
        )
    if with_weights:
        check_new_classifier(source)


def _head_error(source: ModelSource) -> InputError:
    return InputError(
        f"`{source.option}`: {source.path!r} ({type(source.config).__name__}) has no classifier with one linear layer "
        "on the hidden states of a causal model, which a critic needs. Choose another model, or set "
        "`model.critic.shares_trunk` to true."
    )


def read_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a critic, which needs no chat template."""
    from transformers import AutoTokenizer

    _ = source.config  # its errors are clearer
    return source.read("tokenizer", AutoTokenizer)


def _check_tokens(source: ModelSource, policy: ModelSource) -> None:
    """Refuse a critic in which a token of the policy has another id, or no embedding."""
    if source.path == policy.path and source.revision == policy.revision:
        return
    own, wanted = read_tokenizer(source).get_vocab(), policy.tokenizer.get_vocab()
    remedy = "A critic needs the policy's tokenizer: choose a model that was trained from the same one."
    for token, number in sorted(wanted.items(), key=itemgetter(1)):
        if own.get(token) != number:
            has = f"has the id {own[token]}" if token in own else "is missing"
            raise InputError(
                f"`{source.option}`: the token {token!r}, id {number} of the policy {policy.path!r}, {has} in the "
                f"tokenizer of {source.path!r}. {remedy}"
            )
    size, tokens = source.config.get_text_config().vocab_size, len(policy.tokenizer)
    if size < min(tokens, policy.config.get_text_config().vocab_size):
        raise InputError(
            f"`{source.option}`: {source.path!r} has {size} embeddings, but the tokenizer of the policy "
            f"{policy.path!r} has {tokens} tokens. {remedy}"
        )


def check_critic_lora(source: ModelSource, lora: LoRA) -> None:
    """Refuse adapters that the critic's model can't have."""
    adapter_targets(empty_classifier(source), lora)


def load_critic(
    source: ModelSource,
    seed: int,
    lora: LoRA | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    compute: Compute = Compute(),  # noqa: B008 - frozen
    use_liger_kernel: bool | None = None,
    longest: int | None = None,
) -> Any:
    """Load the classifier that a critic starts from, ready for `ValueLM`.

    Args:
        source: A reward model, whose head and mean score are kept, or a causal LM, which gets a new head.
        seed: Seed of a new head and of adapters.
        lora: Adapters that train with the head instead of all weights; None for all weights.
        dtype: Dtype of the weights.
        attn_implementation: Attention implementation of transformers.
        compute: Device and dtypes of the computation; fast paths are checked for them.
        use_liger_kernel: Whether liger-kernel computes norms, MLPs and rotary embeddings; None for wherever it can.
        longest: Tokens of the run's longest row, whose rotary factors all rows get, as in the policy.

    Raises:
        InputError: The weights can't be read, or the head does not read the last token's hidden state.
    """
    lacks_sdpa = attn_implementation == "sdpa" and not empty_classifier(source)._supports_sdpa
    attention = "eager" if lacks_sdpa else attn_implementation
    if has_head(source):
        model = load_classifier(source, None, dtype, attention)
        check_finite(model, source)
    else:
        model = new_classifier(source, seed, dtype, attention)
    if find_linear_head(model) != HEAD:
        raise _head_error(source)
    stabilize_rotary(model, source.config, longest)
    share_prompts(model, compute, from_eager=lacks_sdpa)
    apply_liger(model, compute, use_liger_kernel, source.option)
    if lora is not None:
        add_lora(model, lora, seed, train_head=True)
    return model
