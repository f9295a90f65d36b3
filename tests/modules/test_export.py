"""Exported folders equal those that `save_pretrained` of transformers writes of the same model in that dtype."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from rlhf_pl.distributed.gather_weights import weights_of
from rlhf_pl.models.export_stamp import STAMP, find_damaged_files
from rlhf_pl.models.policy import empty_lm, load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.export import export_dtype, export_folder, try_export
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer, save_llama

SMALL: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"tie_word_embeddings": True, "attention_dropout": 0.1},
    "Qwen2Config": {"tie_word_embeddings": False},
    "Gemma2Config": {"head_dim": 16},
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3MoeConfig": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
    },
    "DeepseekV3Config": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16,
    },
    "GPT2Config": {"n_embd": 64, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.1},
    "GptOssConfig": {"num_local_experts": 4, "head_dim": 32},
}  # fmt: skip


def checkpoint(folder: Path, kind: str, dtype: torch.dtype) -> Path:
    """Save a small random model of a kind with transformers, and a tokenizer."""
    import transformers

    tokenizer = make_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    config = getattr(transformers, kind)(**sizes | SMALL[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def assert_same_folder(exported: Path, saved: Path) -> None:
    """Compare names of files, configs, and every tensor with its name and dtype."""
    assert {f.name for f in exported.iterdir()} - {"rlhf_pl.json"} == {f.name for f in saved.iterdir()}
    assert json.loads((exported / "config.json").read_text()) == json.loads((saved / "config.json").read_text())
    found, expected = tensors(exported), tensors(saved)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    for index in saved.glob("*.index.json"):
        assert json.loads((exported / index.name).read_text()) == json.loads(index.read_text())


def save_in(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """Save a model by transformers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def export(source: Path, folder: Path, dtype: str | None = None) -> Path:
    """Export a model as a run does after training in float32."""
    policy = ModelSource(str(source))
    lm = load_lm(policy)
    export_folder(lm, policy, policy.tokenizer, weights_of(lm.state_dict()), str(folder), dtype)
    return folder


@pytest.mark.parametrize("kind", SMALL)
def test_an_export_equals_the_folder_of_save_pretrained(tmp_path: Path, kind: str) -> None:
    """In the checkpoint's dtype, and in a requested one; tensors that transformers keeps in float32 stay so."""
    source = checkpoint(tmp_path / "source", kind, torch.bfloat16)
    for dtype in (None, "float16"):
        exported = export(source, tmp_path / f"exported-{dtype}", dtype)
        saved = save_in(source, tmp_path / f"saved-{dtype}", getattr(torch, dtype or "bfloat16"))
        assert_same_folder(exported, saved)
        again = export(exported, tmp_path / f"again-{dtype}")
        assert_same_folder(again, saved)


@contextmanager
def shards_of(size: str) -> Iterator[None]:
    """Context in which models are written in files of at most this size."""
    from transformers import PreTrainedModel

    plain = PreTrainedModel.save_pretrained
    PreTrainedModel.save_pretrained = lambda self, *a, **k: plain(self, *a, **{"max_shard_size": size} | k)  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.save_pretrained = plain  # type: ignore[method-assign]


def test_large_models_are_exported_in_shards_with_an_index(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "Qwen2Config", torch.bfloat16)
    with shards_of("100KB"):
        exported, saved = export(source, tmp_path / "exported"), save_in(source, tmp_path / "saved", torch.bfloat16)
    assert (saved / "model.safetensors.index.json").exists()
    assert_same_folder(exported, saved)


def test_the_tensors_dtype_counts_and_not_the_configs(tmp_path: Path) -> None:
    """There are checkpoints whose config says float32, or nothing, while their tensors are in bfloat16."""
    source = checkpoint(tmp_path / "source", "LlamaConfig", torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    for declared in ("float32", "float16", None):
        (source / "config.json").write_text(json.dumps({**config, "dtype": declared}))
        assert export_dtype(ModelSource(str(source))) == torch.bfloat16
    assert export_dtype(ModelSource(str(source)), "float32") == torch.float32
    assert export_dtype(ModelSource(str(checkpoint(tmp_path / "f", "LlamaConfig", torch.float32)))) == torch.float32


def test_a_head_that_differs_from_its_tied_embeddings_is_kept(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "LlamaConfig", torch.float32)
    policy = ModelSource(str(source))
    lm = load_lm(policy)
    state = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    state["lm_head.weight"] += 1
    export_folder(lm, policy, policy.tokenizer, weights_of(state), str(tmp_path / "exported"))
    assert torch.equal(tensors(tmp_path / "exported")["lm_head.weight"], state["lm_head.weight"])


def test_an_export_that_would_fail_is_refused_before_any_weights_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource(str(save_llama(tmp_path / "llama")))
    try_export(empty_lm(source), source, source.tokenizer)
    monkeypatch.setattr(type(source.tokenizer), "save_pretrained", _refuse)
    with pytest.raises(InputError, match=r"`model.policy`: .* could not be exported after the training: no such luck"):
        try_export(empty_lm(source), source, source.tokenizer)


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("no such luck\nmore")


def test_a_config_that_transformers_refuses_to_save_is_copied_unchanged(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "LlamaConfig", torch.bfloat16)
    text = '{"bos_token_id":1,"eos_token_id":2,"do_sample":false,"temperature":0.6,"top_p":0.9}'
    (source / "generation_config.json").write_text(text)
    policy = ModelSource(str(source))
    try_export(empty_lm(policy), policy, policy.tokenizer)
    exported = export(source, tmp_path / "exported")
    assert (exported / "generation_config.json").read_text() == text


def test_reward_models_are_exported_as_transformers_saves_them(tmp_path: Path) -> None:
    """A classifier that reads pairs of texts and has no chat template."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

    from rlhf_pl import RewardModelModule

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=2, num_labels=1, pad_token_id=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    module = RewardModelModule(str(tmp_path / "source"), pair_encoding=True)
    module.try_export()
    module.configure_model()
    module.try_export()
    module.export(str(tmp_path / "exported"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "source", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "saved")
    assert_same_folder(tmp_path / "exported", tmp_path / "saved")


@pytest.mark.parametrize("module", ["RebelModule", "SFTModule"])
def test_adapters_are_merged_into_the_exported_model(tmp_path: Path, module: str) -> None:
    """New adapters change nothing: the export has the base's own tensors, and the adapters beside them."""
    import rlhf_pl

    source = checkpoint(tmp_path / "source", "LlamaConfig", torch.bfloat16)
    policy = getattr(rlhf_pl, module)(str(source), lora=rlhf_pl.LoRA(rank=2))
    policy.try_export()
    policy.configure_model()
    policy.try_export()
    policy.export(str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "adapter" / "adapter_model.safetensors").exists()
    shutil.rmtree(tmp_path / "exported" / "adapter")
    assert_same_folder(tmp_path / "exported", save_in(source, tmp_path / "saved", torch.bfloat16))


def test_processor_files_are_exported(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "LlamaConfig", torch.bfloat16)
    (source / "preprocessor_config.json").write_text('{"size": 3}')
    assert (export(source, tmp_path / "exported") / "preprocessor_config.json").read_text() == '{"size": 3}'


@pytest.mark.parametrize("text", ['{"num_return_sequences": 3}', '{"max_new_tokens": -5}', "[1]"])
def test_a_generation_config_that_transformers_refuses_to_read_is_named(tmp_path: Path, text: str) -> None:
    source = checkpoint(tmp_path / "source", "LlamaConfig", torch.bfloat16)
    (source / "generation_config.json").write_text(text)
    with pytest.raises(InputError, match=r"generation_config\.json.*orrect"):
        _ = ModelSource(str(source)).eos_token_ids


def test_an_export_of_an_earlier_version_without_a_file_list_is_not_damaged(tmp_path: Path) -> None:
    (tmp_path / STAMP).write_text(json.dumps({"format": 2, "updates": 3, "dtype": None, "weights": "x"}))
    assert find_damaged_files(tmp_path, checksums=True) == []
