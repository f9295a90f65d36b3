"""The token at which a score is read: the same in training, in process, on servers and in other tools."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_pl.models import score_position
from rlhf_pl.models.packed_batch import make_prefix_group
from rlhf_pl.models.rendering import Renderer, pad_rows, reward_renderer
from rlhf_pl.models.sequence_classifier import ClassifierLM, load_classifier, new_classifier, prefix_group_inputs
from rlhf_pl.models.source import ModelSource
from rlhf_pl.modules.padding_token import choose_padding
from rlhf_pl.rewards import ClassifierReward, VLLMServerReward
from rlhf_pl.utils.errors import InputError
from tests.conftest import CHAT_TEMPLATE, make_tokenizer, save_reward_model
from tests.rewards.test_classifier import SAMPLES, plain_scores, row_of

EOS = 2  # <|end|>, which `CHAT_TEMPLATE` writes after every message


@pytest.fixture(scope="module")
def ambiguous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose padding token is its EOS."""
    return save_reward_model(tmp_path_factory.mktemp("ambiguous"), pad_token_id=EOS)


def by_hand(folder: Path, drop: int) -> list[float]:
    """The head on the hidden state of the last token after dropping `drop` tokens, row by row, by transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scores = []
    for sample in SAMPLES:
        ids = row_of(tokenizer, sample)
        with torch.no_grad():
            hidden = model.eval().model(input_ids=ids).last_hidden_state
        scores.append(model.score(hidden[0, -1 - drop]).item())
    return scores


def scores(folder: Path, **options: Any) -> list[float]:
    reward = ClassifierReward(str(folder), **options)
    reward.check(SAMPLES)
    return [result.reward for result in reward.score(SAMPLES)]


@pytest.mark.parametrize("options", [{}, {"attn_implementation": "eager"}, {"tokens_per_batch": 1}])
def test_the_score_is_read_at_the_last_token_even_if_it_is_the_padding_token(
    ambiguous: Path, options: dict[str, Any]
) -> None:
    at_eos, before = by_hand(ambiguous, 0), by_hand(ambiguous, 1)
    assert min(abs(a - b) for a, b in zip(at_eos, before, strict=True)) > 1e-2
    assert scores(ambiguous, **options) == pytest.approx(at_eos, abs=1e-5)
    assert scores(ambiguous, score_at="eos", **options) == pytest.approx(at_eos, abs=1e-5)
    assert scores(ambiguous, score_at="before_eos", **options) == pytest.approx(before, abs=1e-5)
    assert plain_scores(ambiguous) == pytest.approx(before, abs=1e-5), "transformers reads before its padding token"


def test_text_of_the_template_after_the_eos_is_not_the_eos(ambiguous: Path, tmp_path: Path) -> None:
    template = tmp_path / "newline.jinja"
    template.write_text(CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n"))
    rows = {
        place: reward_renderer(ModelSource(str(ambiguous), chat_template=str(template)), 99, "keep", score_at=place)(  # type: ignore[arg-type]
            SAMPLES[0].messages, "red"
        )
        for place in ("last", "eos", "before_eos")
    }
    ids = rows["last"].ids
    assert make_tokenizer().decode(ids[-2:]) == "<|end|>\n"
    assert rows["eos"].ids == ids[:-1]
    assert rows["before_eos"].ids == ids[:-2]
    assert rows["before_eos"].turn == rows["last"].turn


def test_scores_do_not_depend_on_padding_or_packing(ambiguous: Path) -> None:
    """Padded on the right, on the left, and with a shared prefix computed once."""
    model = ClassifierLM(load_classifier(ModelSource(str(ambiguous)))).eval()
    render = reward_renderer(ModelSource(str(ambiguous)), 99, "keep")
    rows = [render(s.messages, s.response) for s in SAMPLES]
    right = pad_rows(rows, EOS)
    left = {name: torch.zeros_like(tensor) for name, tensor in right.items()}
    for i, row in enumerate(rows):
        left["input_ids"][i, -len(row) :], left["attention_mask"][i, -len(row) :] = torch.tensor(row.ids), 1
    expected = by_hand(ambiguous, 0)
    with torch.no_grad():
        for inputs in (right, left, prefix_group_inputs([make_prefix_group([row.ids for row in rows])])):
            assert model(**inputs).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_warning_for_models_that_other_tools_read_elsewhere_is_printed_once(
    ambiguous: Path, reward_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_position, "_warned", set())
    for _ in range(2):
        ClassifierReward(str(ambiguous)).check(SAMPLES)
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("warning:") == 1
    assert "`score_at: before_eos`" in output
    VLLMServerReward("http://x", str(ambiguous)).check(SAMPLES)
    assert "`rollout.reward.tokenizer`" in capsys.readouterr().out
    ClassifierReward(str(ambiguous), score_at="last").check(SAMPLES)
    ClassifierReward(str(reward_model)).check(SAMPLES)
    assert "warning" not in capsys.readouterr().out


def test_rows_for_a_served_model_end_where_its_score_is_read(ambiguous: Path, tmp_path: Path) -> None:
    """vLLM reads the last token of a request, and ignores the mean score in the config."""
    folder = with_config(ambiguous, tmp_path / "mean", bias=0.75)
    rows = {}
    for place in (None, "before_eos"):
        reward = VLLMServerReward("http://x", str(folder), score_at=place)  # type: ignore[arg-type]
        sent: list[dict[str, Any]] = []

        def reply(payloads: list[dict[str, Any]], parse: Any, sent: list[dict[str, Any]] = sent) -> list[Any]:
            sent += payloads
            return [parse(i, {"data": [{"probs": [1.0]}]}) for i, _ in enumerate(payloads)]

        reward._service.map = reply  # type: ignore[method-assign, assignment]
        assert [r.reward for r in reward.score(SAMPLES)] == [0.25] * len(SAMPLES)  # type: ignore[union-attr]
        rows[place] = [payload["input"][0] for payload in sent]
    assert all(row[-1] == EOS for row in rows[None])
    assert [row[:-1] for row in rows[None]] == rows["before_eos"]


def with_config(source: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | changes))
    return target


def test_the_mean_in_a_config_is_subtracted(reward_model: Path, tmp_path: Path) -> None:
    expected = [score - 1.5 for score in plain_scores(reward_model)]
    folder = with_config(reward_model, tmp_path / "mean", bias=1.5)
    assert scores(folder) == pytest.approx(expected, abs=1e-5)
    assert ClassifierReward(str(folder)).fingerprint() != ClassifierReward(str(reward_model)).fingerprint()
    # as the authors publish it: a config that transformers can't read, next to the weights
    (folder / "config.json").write_text(json.dumps({"base_model": "x", "hidden_size": 64, "bias": 1.5}))
    assert scores(folder, base=str(reward_model)) == pytest.approx(expected, abs=1e-5)
    assert scores(with_config(reward_model, tmp_path / "switch", bias=True)) == scores(reward_model)
    with pytest.raises(InputError, match=r"`bias` in the config of .* is 'much'"):
        scores(with_config(reward_model, tmp_path / "text", bias="much"))


def test_a_config_may_set_where_the_score_is_read(ambiguous: Path, tmp_path: Path) -> None:
    folder = with_config(ambiguous, tmp_path / "configured", score_at="before_eos")
    assert scores(folder) == pytest.approx(by_hand(ambiguous, 1), abs=1e-5)
    assert scores(folder, score_at="last") == pytest.approx(by_hand(ambiguous, 0), abs=1e-5)
    with pytest.raises(InputError, match="has `score_at` 'first'; expected one of last, eos, before_eos"):
        scores(with_config(ambiguous, tmp_path / "wrong", score_at="first"))


def test_score_positions_that_do_not_exist_are_refused(ambiguous: Path, tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(InputError, match=r"`score_at` is eos, but the chat template .* writes no EOS"):
        scores(ambiguous, score_at="eos", chat_template=str(template))
    with pytest.raises(InputError, match="`score_at` is eos, but `pair_encoding`"):
        scores(ambiguous, score_at="eos", pair_encoding=True)


def tokenizer_with(pad: str | None = "<|end|>", unk: str | None = None, more: tuple[str, ...] = ()) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.unk_token = pad, unk
    tokenizer.add_special_tokens({"extra_special_tokens": list(more)})
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "free_rows", "token", "new_rows"),
    [
        (tokenizer_with(pad="</s>"), 3, "</s>", 0),  # the model's own padding token
        (tokenizer_with(more=("<|reserved_0|>", "<|right_pad_id|>")), 3, "<|right_pad_id|>", 0),
        (tokenizer_with(more=("<|reserved_0|>",)), 0, "<|reserved_0|>", 0),
        (tokenizer_with(), 3, "<|padding|>", 0),  # in an embedding row without a token
        (tokenizer_with(unk="</s>"), 0, "</s>", 0),  # the unknown token, which no text is encoded as
        (tokenizer_with(), 0, "<|padding|>", 1),
        (tokenizer_with(pad=None), 0, "<|padding|>", 1),
        (tokenizer_with(more=("<|padding|>",), pad="<s>"), 0, "<|padding|>", 0),
    ],
)
def test_the_padding_token_is_one_that_no_conversation_contains(
    tokenizer: Any, free_rows: int, token: str, new_rows: int
) -> None:
    from transformers import LlamaConfig

    before = tokenizer.pad_token
    config = LlamaConfig(vocab_size=len(tokenizer) + free_rows, eos_token_id=EOS, pad_token_id=tokenizer.pad_token_id)
    found = choose_padding(Renderer(tokenizer, 99), config)
    assert (found.tokenizer.pad_token, found.new_rows) == (token, new_rows)
    assert found.id == found.tokenizer.pad_token_id == found.tokenizer.convert_tokens_to_ids(token)
    assert found.id < config.vocab_size + new_rows
    assert tokenizer.pad_token == before, "the tokenizer that was passed in must not change"


def test_training_removes_the_mean_score(reward_model: Path, tmp_path: Path) -> None:
    """It is not the mean of the trained model's scores, and vLLM would treat `bias` as a boolean."""
    folder = with_config(reward_model, tmp_path / "mean", bias=1.5)
    model = new_classifier(ModelSource(str(folder)), seed=0)
    assert not hasattr(model.config, "bias")
    assert ClassifierLM(model).mean == 0
