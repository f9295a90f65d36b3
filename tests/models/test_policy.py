import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlhf_pl.models import kernel_check, logprobs
from rlhf_pl.models.logprobs import Head, chunked_logps, gather_logps, linear_logps
from rlhf_pl.models.packed_batch import PrefixGroup, pack
from rlhf_pl.models.policy import PolicyLM, head_logits, load_lm
from rlhf_pl.models.shared_prefix import _note_not_shared, share_prompts, takes_prefix_groups
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer, save_llama

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GROUPS = [
    PrefixGroup([5, 6, 7, 8], ([9, 10, 11], [30, 31, 32, 33, 34, 35])),
    PrefixGroup([5], ([12],)),
    PrefixGroup([20, 21, 22], ([23, 24, 25, 26, 27], [28], [23, 24, 29])),
]


def naive_logps(lm: Any, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs from the full logits of each prompt with one response, without padding: shape (targets,)."""
    found = []
    for group in GROUPS:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            logps = (lm(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
            found += [logps[t - 1, ids[0, t]] for t in range(len(group.prompt), ids.shape[1])]
    return torch.stack(found)


def model(architecture: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SMALL | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("architecture", "changes", "shares"),
    [
        ("Llama", {}, True),
        ("Llama", {"tie_word_embeddings": True}, True),
        ("Qwen2", {}, True),
        ("Mistral", {"sliding_window": 4}, True),
        (("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8, "attn_implementation": "eager"}, False)),
        ("Granite", {"logits_scaling": 4.0}, True),
        ("Cohere", {"logit_scale": 0.25}, True),
        ("GPTNeoX", {}, True),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
        ("Mamba", {"state_size": 4}, False),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_and_gradient_equal_full_logits(
    architecture: str, changes: dict[str, Any], shares: bool, temperature: float
) -> None:
    """As rows of prompt and response, and with shared prompts if the architecture supports them."""
    lm = model(architecture, **changes)
    batch = pack(GROUPS)
    expected = naive_logps(lm, temperature)
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    gradient = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    policy = PolicyLM(lm, logprob_chunk_tokens=2)
    for shared in (False, True):
        if shared:
            assert share_prompts(lm) == shares
        lm.zero_grad()
        actual = policy(**batch.inputs(), temperature=temperature)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected.detach(), atol=1e-4, rtol=0)
        (actual * weights).sum().backward()
        for name, parameter in lm.named_parameters():
            if name in gradient:
                torch.testing.assert_close(parameter.grad, gradient[name], atol=1e-4, rtol=1e-4)


def test_prompts_are_computed_once() -> None:
    """The layers compute each token once, including those of prompts."""
    lm = model("Llama")
    assert share_prompts(lm)
    seen: list[int] = []
    lm.model.layers[0].mlp.register_forward_hook(lambda m, inputs, output: seen.append(output.shape[:-1].numel()))
    PolicyLM(lm)(**pack(GROUPS).inputs())
    assert seen == [sum(map(len, GROUPS))]


def test_a_model_that_ignores_positions_gets_rows_and_reports_it_once(
    source: ModelSource, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_lm(source)
    lm.set_attn_implementation("sdpa")
    backbone = transformers.LlamaModel.forward
    monkeypatch.setattr(kernel_check, "_results", {})
    monkeypatch.setattr(
        transformers.LlamaModel,
        "forward",
        lambda self, **inputs: backbone(self, **{k: v for k, v in inputs.items() if k != "position_ids"}),
    )
    _note_not_shared.cache_clear()
    assert not share_prompts(lm)
    assert not share_prompts(lm)
    assert lm.config._attn_implementation == "sdpa"
    assert capsys.readouterr().out.count("sdpa attention of LlamaForCausalLM can't share a prompt between") == 1
    load_lm(source, attn_implementation="eager")
    assert "eager attention of LlamaForCausalLM can't share" in capsys.readouterr().out


def test_gradient_checkpointing_changes_nothing(source: ModelSource) -> None:
    batch = pack(GROUPS)
    found = []
    for checkpointing in (False, True):
        lm = load_lm(source).train()
        if checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        PolicyLM(lm)(**batch.inputs()).sum().backward()
        found.append({n: p.grad for n, p in lm.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_sums_are_per_response() -> None:
    batch = pack(GROUPS)
    lengths = [len(response) for group in GROUPS for response in group.responses]
    values = torch.arange(sum(lengths), dtype=torch.float32)
    assert batch.sum_per_response(values).tolist() == [part.sum().item() for part in values.split(lengths)]


def test_logps_do_not_depend_on_chunks() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 4), torch.nn.Linear(4, 50)
    targets = torch.randint(50, (10,))
    whole = gather_logps(head(hidden), targets, 0.5)
    for chunk in (1, 3, 10, 100):
        torch.testing.assert_close(chunked_logps(hidden, targets, head, 0.5, chunk), whole)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("chunk", "block"), [(1, 7), (3, 50), (10, 16), (100, 100)])
def test_logps_do_not_depend_on_blocks_of_the_vocabulary(
    bias: bool, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares to plain torch, with large logits and a different gradient for each token."""
    monkeypatch.setattr(logprobs, "VOCABULARY_BLOCK", block)
    torch.manual_seed(0)
    hidden, head = (10 * torch.randn(10, 4)).requires_grad_(), torch.nn.Linear(4, 50, bias=bias)
    inputs = [hidden, *head.parameters()]
    targets, factors = torch.randint(50, (10,)), torch.randn(10)
    expected = gather_logps(head(hidden), targets, 0.5)
    found = linear_logps(hidden, targets, Head(head.weight, head.bias), 0.5, chunk)
    torch.testing.assert_close(found, expected)
    for ours, plain in zip(*(torch.autograd.grad(t, inputs, factors) for t in (found, expected)), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_a_frozen_head_gets_no_gradient_and_no_targets_give_an_empty_result() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(50, 4)
    linear_logps(hidden, torch.arange(5), Head(weight)).sum().backward()
    assert hidden.grad is not None
    assert linear_logps(hidden[:0], torch.arange(0), Head(weight)).shape == (0,)


def test_logits_are_float32_under_autocast(llama: Path) -> None:
    """bf16 logits would have much larger errors."""
    lm = load_lm(ModelSource(str(llama)))
    hidden = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = head_logits(lm, hidden)
    torch.testing.assert_close(actual, lm.lm_head(hidden), atol=1e-5, rtol=0)


def test_dropout_is_off(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", attention_dropout=0.5)
    policy = PolicyLM(load_lm(ModelSource(str(folder)))).train()
    first, second = (policy(**pack(GROUPS).inputs()) for _ in range(2))
    assert torch.equal(first, second)


def test_unknown_logit_scaling_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_llama(tmp_path / "model")
    original = transformers.LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", doubled)
    monkeypatch.setattr(kernel_check, "_results", {})
    with pytest.raises(InputError, match="changes its logits"):
        load_lm(ModelSource(str(folder)))


def test_every_eos_id_counts(source: ModelSource) -> None:
    """The tokenizer and the config have id 2, the generation config has 1 and 2."""
    assert source.eos_token_ids == (1, 2)


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    for path in (str(tmp_path / "missing"), "x" * 300):
        with pytest.raises(InputError, match="no folder"):
            _ = ModelSource(path).config
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        _ = ModelSource(str(tmp_path / "empty")).config


def test_a_padding_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": config["vocab_size"]}))
    with pytest.raises(InputError, match=r"`pad_token_id` \d+, but the model has \d+ embeddings.* in its config.json"):
        _ = ModelSource(str(folder)).config


def test_missing_chat_template_is_refused_and_can_be_given(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="no chat template"):
        _ = ModelSource(str(folder)).tokenizer
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert ModelSource(str(folder), chat_template=str(template)).tokenizer.chat_template == template.read_text()


def test_a_model_without_sdpa_works_and_shares_prompts(tmp_path: Path) -> None:
    """gpt-oss has attention sinks, and sliding windows in every other layer."""
    folder = tmp_path / "model"
    lm = model(
        "GptOss", num_local_experts=2, num_experts_per_tok=1, head_dim=8, sliding_window=4, initializer_range=0.3
    )
    lm.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    policy = PolicyLM(load_lm(ModelSource(str(folder))))
    assert takes_prefix_groups(policy.lm)
    lm.set_attn_implementation("eager")
    torch.testing.assert_close(policy(**pack(GROUPS).inputs()).double(), naive_logps(lm), atol=1e-4, rtol=0)


def test_rows_of_a_model_that_shares_prompts_keep_soft_capping() -> None:
    """Gemma-2 with logits that the cap changes, padded on either side."""
    lm = model("Gemma2", head_dim=8, sliding_window=4, attn_logit_softcapping=0.5, initializer_range=0.5)
    lm.set_attn_implementation("eager")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 0, 0, 0]])
    for mask in (torch.tensor([[1] * 8, [1] * 5 + [0] * 3]), torch.tensor([[1] * 8, [0] * 3 + [1] * 5]), None):
        lm.set_attn_implementation("eager")
        expected = lm(input_ids=ids, attention_mask=mask).logits
        lm.set_attn_implementation("sdpa")
        assert share_prompts(lm)
        found = lm(input_ids=ids, attention_mask=mask).logits
        counts = torch.ones_like(ids).bool() if mask is None else mask.bool()
        torch.testing.assert_close(found[counts], expected[counts], atol=1e-5, rtol=1e-4)


def test_a_model_whose_backbone_is_itself_is_refused(tmp_path: Path) -> None:
    lm = model("Llama4Text", num_local_experts=2, head_dim=8, attention_chunk_size=8, intermediate_size_mlp=32)
    lm.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="has no backbone"):
        load_lm(ModelSource(str(tmp_path / "model")))
