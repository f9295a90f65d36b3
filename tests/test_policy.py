from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlhf_pl.errors import InputError
from rlhf_pl.logprobs import chunked_logps, gather_logps
from rlhf_pl.policy import PolicyLM, PolicySource, load_lm
from rlhf_pl.rows import Row, pad_rows
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
ROWS = [Row([5, 6, 7, 8], [9, 10, 11]), Row([5], [12]), Row([20, 21, 22], [23, 24, 25, 26, 27])]


def naive_logps(lm: Any, row: Row, temperature: float) -> torch.Tensor:
    """From the full logits of the row alone, without padding: shape (response tokens,)."""
    ids = torch.tensor([[*row.prompt, *row.response]])
    logits = lm(input_ids=ids).logits[0].double() / temperature
    logps = logits.log_softmax(-1)
    return torch.stack([logps[t - 1, ids[0, t]] for t in range(len(row.prompt), len(row))])


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("GPTNeoX", {}),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_full_logits(architecture: str, changes: dict[str, Any], temperature: float) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**SMALL | changes)
    lm = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    batch = pad_rows(ROWS)
    policy = PolicyLM(lm, logprob_chunk_tokens=2)
    actual = policy(batch.input_ids, batch.attention_mask, batch.response_mask, temperature)
    assert actual.dtype == torch.float32
    for i, row in enumerate(ROWS):
        expected = naive_logps(lm, row, temperature)
        torch.testing.assert_close(actual[i, len(row.prompt) : len(row)].double(), expected, atol=1e-4, rtol=0)
    assert (actual[~batch.response_mask] == 0).all()


def test_gradients_equal_those_of_full_logits(llama: Path) -> None:
    lm = load_lm(PolicySource(str(llama))).train()
    batch = pad_rows(ROWS)
    PolicyLM(lm, 2)(batch.input_ids, batch.attention_mask, batch.response_mask).sum().backward()
    actual = {n: p.grad.clone() for n, p in lm.named_parameters()}
    lm.zero_grad()
    sum(naive_logps(lm, row, 1.0).sum() for row in ROWS).backward()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_chunks_do_not_matter() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 4), torch.nn.Linear(4, 50)
    targets = torch.randint(50, (10,))
    whole = gather_logps(head(hidden), targets, 0.5)
    for chunk in (1, 3, 10, 100):
        torch.testing.assert_close(chunked_logps(hidden, targets, head, 0.5, chunk), whole)


def test_logits_are_float32_under_autocast(llama: Path) -> None:
    """bf16 logits would be off by far more than this."""
    lm = load_lm(PolicySource(str(llama)))
    hidden = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = PolicyLM(lm).logits(hidden)
    torch.testing.assert_close(actual, lm.lm_head(hidden), atol=1e-5, rtol=0)


def test_dropout_is_off(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", attention_dropout=0.5)
    policy = PolicyLM(load_lm(PolicySource(str(folder)))).train()
    batch = pad_rows(ROWS)
    first, second = (policy(batch.input_ids, batch.attention_mask, batch.response_mask) for _ in range(2))
    assert torch.equal(first, second)


def test_unknown_logit_scaling_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_llama(tmp_path / "model")
    original = transformers.LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", doubled)
    with pytest.raises(InputError, match="changes its logits"):
        load_lm(PolicySource(str(folder)))


def test_every_eos_id_counts(source: PolicySource) -> None:
    """The tokenizer and the config say 2, the generation config says 1 and 2."""
    assert source.eos_token_ids == (1, 2)


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        _ = PolicySource(str(tmp_path / "missing")).config
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        _ = PolicySource(str(tmp_path / "empty")).config


def test_missing_chat_template_is_refused_and_can_be_given(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="no chat template"):
        _ = PolicySource(str(folder)).tokenizer
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert PolicySource(str(folder), chat_template=str(template)).tokenizer.chat_template == template.read_text()
