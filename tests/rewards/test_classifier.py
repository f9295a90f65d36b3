"""Reward models with one output: the scores of plain transformers, or a clear error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_pl.models import sequence_classifier as classifier
from rlhf_pl.rewards import ClassifierReward, Sample
from rlhf_pl.utils.errors import InputError
from tests.conftest import make_tokenizer

SAMPLES = [
    Sample("a", [{"role": "user", "content": "Name three colours."}], "red, green and blue"),
    Sample(
        "b", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me of the sea."}], "Wet"
    ),
    Sample("c", [{"role": "user", "content": "What is the capital of France? " * 4}], ""),
    Sample("c", [{"role": "user", "content": "What is the capital of France? " * 4}], "Paris"),
    Sample("c", [{"role": "user", "content": "What is the capital of France? " * 4}], "Paris, of course"),
]
Tensors = dict[str, torch.Tensor]


def row_of(tokenizer: Any, sample: Sample) -> torch.Tensor:
    """A conversation as plain transformers tokenizes it, shape (1, T)."""
    chat = [*sample.messages, {"role": "assistant", "content": sample.response}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def plain_scores(folder: Path) -> list[float]:
    """Scores of an independent computation: transformers' classes, one row at a time."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scores = []
    for sample in SAMPLES:
        ids = row_of(tokenizer, sample)
        with torch.no_grad():
            scores.append(model.eval()(input_ids=ids).logits[0, 0].item())
    return scores


def compute_scores(folder: Path, **options: object) -> list[float]:
    reward = ClassifierReward(str(folder), **options)  # type: ignore[arg-type]
    reward.check(SAMPLES)
    return [result.reward for result in reward.score(SAMPLES)]


def make_changed_copy(source: Path, target: Path, change: Callable[[Tensors], Tensors], **config: object) -> Path:
    """A copy with changed tensors, and without labels in its config, like the checkpoints of other trainers."""
    shutil.copytree(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    content = json.loads((target / "config.json").read_text())
    content = {k: v for k, v in content.items() if k not in ("id2label", "label2id")} | config
    (target / "config.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 10_000])
def test_batches_give_the_scores_of_single_rows_in_plain_transformers(
    reward_model: Path, tokens_per_batch: int
) -> None:
    assert compute_scores(reward_model, tokens_per_batch=tokens_per_batch) == pytest.approx(
        plain_scores(reward_model), abs=1e-5
    )


def test_a_prompt_is_computed_once_for_its_responses(reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token_counts: list[int] = []
    hidden_states = classifier.hidden_states

    def count_tokens(lm: object, ids: torch.Tensor, *others: object) -> torch.Tensor:
        token_counts.append(ids.numel())
        return hidden_states(lm, ids, *others)

    monkeypatch.setattr(classifier, "hidden_states", count_tokens)
    together, apart = [], []
    for batch in (SAMPLES[2:], *([s] for s in SAMPLES[2:])):
        token_counts.clear()
        rewards = [r.reward for r in ClassifierReward(str(reward_model)).score(batch)]
        (together if len(batch) > 1 else apart).append((rewards, sum(token_counts)))
    assert together[0][0] == pytest.approx([reward for rewards, _ in apart for reward in rewards], abs=1e-5)
    assert together[0][1] < 0.6 * sum(tokens for _, tokens in apart)


def test_without_a_padding_token_batches_still_agree(reward_model: Path, tmp_path: Path) -> None:
    folder = make_changed_copy(reward_model, tmp_path / "nopad", lambda t: t, pad_token_id=None, num_labels=1)
    expected = plain_scores(reward_model)
    assert compute_scores(folder) == pytest.approx(expected, abs=1e-5)


def test_encoders_run_through_their_own_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = make_tokenizer()
    BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **sizes)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert compute_scores(tmp_path) == pytest.approx(plain_scores(tmp_path), abs=1e-5)
    assert len(set(compute_scores(tmp_path, pair_encoding=True))) == len(SAMPLES)


HEADS: dict[str, Callable[[str], str]] = {
    "v_head.summary.weight": lambda name: name,  # TRL
    "value_head.weight": lambda name: name,  # OpenRLHF
    "v_head.weight": lambda name: "transformer." + name.removeprefix("model."),  # Starling
    "rm_head.weight": lambda name: "pretrained_model." + name,
    "scalar_head.weight": lambda name: "lm_backbone." + name.removeprefix("model."),  # CleanRL
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_with_other_names_are_supported(reward_model: Path, tmp_path: Path, head: str) -> None:
    folder = make_changed_copy(
        reward_model,
        tmp_path / "other",
        lambda t: {head if n == "score.weight" else HEADS[head](n): v for n, v in t.items()},
    )
    assert compute_scores(folder) == pytest.approx(plain_scores(reward_model), abs=1e-5)


def test_a_bias_is_added_and_weights_need_no_config(reward_model: Path, tmp_path: Path) -> None:
    tensors = load_file(reward_model / "model.safetensors")
    head = tensors.pop("score.weight")
    state = {"transformer." + n.removeprefix("model."): v for n, v in tensors.items()}
    torch.save(state | {"v_head.weight": head, "v_head.bias": torch.tensor([0.5])}, tmp_path / "pytorch_model.bin")
    expected = [score + 0.5 for score in plain_scores(reward_model)]
    assert compute_scores(tmp_path, base=str(reward_model)) == pytest.approx(expected, abs=1e-5)


def test_weights_with_names_of_transformers_need_no_config(reward_model: Path, tmp_path: Path) -> None:
    shutil.copy(reward_model / "model.safetensors", tmp_path)
    assert compute_scores(tmp_path, base=str(reward_model)) == pytest.approx(plain_scores(reward_model), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != "score.weight"}, "lacks the head .* score.weight"),
        (lambda t: t | {"score.weight": torch.zeros(3, 64)}, "has 3 labels; a reward model has 1"),
        (
            lambda t: (
                {n: v for n, v in t.items() if n != "score.weight"}
                | {"score.0.weight": torch.zeros(64, 64), "score.2.weight": torch.zeros(1, 64)}
            ),
            "score.0.weight, score.2.weight, which is not one linear layer",
        ),
        (lambda t: {n: v for n, v in t.items() if "layers.1" not in n}, "lacks model.layers.1"),
    ],
)
def test_missing_weights_are_never_initialized(
    reward_model: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compute_scores(make_changed_copy(reward_model, tmp_path / "broken", change))


def test_long_conversations_are_truncated_on_the_left_of_the_prompt_and_counted(reward_model: Path) -> None:
    reward = ClassifierReward(str(reward_model), max_tokens=24)
    row = reward.renderer()(SAMPLES[2].messages, "Paris it is")
    tokenizer = make_tokenizer()
    assert len(row) == 24
    assert row.ids[0] == tokenizer.bos_token_id
    assert row.turn is not None
    assert tokenizer.decode(row.ids[row.turn :]) == "<|end|><|assistant|>Paris it is<|end|>"
    assert [bool(r.truncated_tokens) for r in reward.score(SAMPLES)] == [False, False, True, True, True]


def test_dropped_system_prompts_change_the_score(reward_model: Path) -> None:
    kept, dropped = compute_scores(reward_model), compute_scores(reward_model, system_prompt="drop")
    assert kept[0] == pytest.approx(dropped[0], abs=1e-5)
    assert abs(kept[1] - dropped[1]) > 1e-3


def test_changed_weights_have_another_fingerprint(reward_model: Path, tmp_path: Path) -> None:
    other = make_changed_copy(
        reward_model, tmp_path / "other", lambda t: t | {"score.weight": t["score.weight"] + 1e-6}
    )
    assert ClassifierReward(str(other)).fingerprint() != ClassifierReward(str(reward_model)).fingerprint()
