"""liger-kernel in a model: what is changed, and what is not. `test_gpu.py` checks its results."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from rlhf_pl.models.compute import Compute
from rlhf_pl.models.liger import _bind, _find_failure
from rlhf_pl.models.policy import load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError

needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="no liger-kernel")


@needs_liger
def test_liger_is_bound_to_one_model_without_changing_the_process(source: ModelSource) -> None:
    before = dict(vars(modeling_llama))
    forwards = {name: vars(v).get("forward") for name, v in before.items() if isinstance(v, type)}
    cross_entropy = torch.nn.functional.cross_entropy
    lm, other = load_lm(source), load_lm(source)
    _bind(lm)
    layer: Any = lm.model.layers[0]
    assert [("Liger" in repr(m)) for m in (lm.model.norm, layer.input_layernorm, layer.mlp)] == [True] * 3
    own = layer.self_attn.forward.__func__
    assert own.__globals__["apply_rotary_pos_emb"].__module__.startswith("liger_kernel")
    assert own.__code__ is modeling_llama.LlamaAttention.forward.__code__
    assert "Liger" not in repr(other)
    assert "forward" not in vars(other.model.layers[0].self_attn)
    assert dict(vars(modeling_llama)) == before
    assert {n: vars(v).get("forward") for n, v in before.items() if isinstance(v, type)} == forwards
    assert torch.nn.functional.cross_entropy is cross_entropy


@needs_liger
def test_every_known_architecture_can_be_bound_or_has_a_reason() -> None:
    """Kernels that fail, here without a GPU, are detected before the real model is changed."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"} <= set(MODEL_TYPE_TO_APPLY_LIGER_FN)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3"):
        config = getattr(transformers, f"{name}Config")(**sizes, num_attention_heads=2, num_key_value_heads=1)
        lm = transformers.AutoModelForCausalLM.from_config(config)
        assert _find_failure(lm, Compute())
        assert "Liger" not in repr(lm)
        _bind(lm)
        assert "Liger" in repr(lm)


def test_liger_can_be_disabled_but_not_required_without_a_gpu(source: ModelSource) -> None:
    load_lm(source, use_liger_kernel=False)
    with pytest.raises(InputError, match=r"`model\.use_liger_kernel` is true.*there is no GPU"):
        load_lm(source, use_liger_kernel=True)
