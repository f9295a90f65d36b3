"""Tools, calls, thinking and the date, from a file's rows to tokens, rewards and manifests, in every stage."""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from rlhf_pl import (
    OfflineDataModule,
    PreferenceDataModule,
    RebelModule,
    RewardModelModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_pl.rewards import ClassifierReward, Sample, ScoringConfig
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils import run_date
from rlhf_pl.utils.errors import InputError
from tests import chat_templates
from tests.conftest import save_llama
from tests.integration.test_fit import fit
from tests.models.test_chat_template import ASK, RESULT, TOOLS, call, plain, tokenizer

Write = Callable[..., str]
RESPONSE = {"role": "assistant", "content": "22 degrees."}
SCORED: list[Sample] = []


def reward(samples: Sequence[Sample]) -> list[float]:
    SCORED.extend(samples)
    return [float(i % 7) for i in range(len(samples))]


@pytest.fixture
def template(tmp_path: Path) -> Callable[[str], str]:
    def write(name: str, before: str = "") -> str:
        file = tmp_path / f"{name}.jinja"
        file.write_text(before + getattr(chat_templates, name))
        return str(file)

    return write


def set_up(module: L.LightningModule, data: Any, folder: Path) -> Any:
    data.trainer = L.Trainer(logger=False, accelerator="cpu", default_root_dir=folder)
    data.trainer.strategy._lightning_module = module
    data.setup("fit")
    return data


def test_rounds_of_a_policy_that_thinks_and_calls(
    tmp_path: Path, write_jsonl: Write, template: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts equal the rendering of transformers, rewards see no thinking, and the next day changes nothing."""
    rows: list[dict[str, Any]] = [
        {"prompt_id": str(i), "prompt": [ASK, call('{"city": "Paris"}'), RESULT | {"content": str(i)}]}
        for i in range(6)
    ]
    llama = save_llama(tmp_path / "llama", max_position_embeddings=1024)
    options: dict[str, Any] = {
        "module": {"chat_template": template("DEEPSEEK", "{{ strftime_now('%A') }}")},
        "data": {"val_prompts": 0, "max_prompt_tokens": 256},
        "refresh": {"reward": reward, "scoring": ScoringConfig(strip_thinking=True), "val_num_responses": 1},
        "max_epochs": 1,
    }
    SCORED.clear()
    fit(tmp_path / "run", llama, write_jsonl(rows), **options)
    stored = RoundStore(tmp_path / "run").round(0)
    today = datetime.now().strftime("%A")
    for row in stored.read("responses").to_pylist():
        messages = rows[int(row["prompt_id"])]["prompt"]
        text = tokenizer("DEEPSEEK").decode(row["prompt_tokens"])
        assert text == today + plain("DEEPSEEK", messages)
        assert text.endswith("<think>\n")
        assert row["response_tokens"]
    assert {tuple(m["role"] for m in s.messages) for s in SCORED} == {("user", "assistant", "tool")}
    sampled = [s for s in SCORED if s.response_tokens or not s.finished][-18:]
    assert {(s.response, len(s.response_tokens), s.finished) for s in sampled} == {("", 0, False)}
    settings = stored.manifest["settings"]["rewards"]
    assert settings["strip_thinking"] == ["<think>", "</think>"]
    assert settings["messages"]

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Later":
            return cls(2031, 1, 1 + (datetime.now().weekday() == 2))  # a Wednesday, or the Thursday after it

    monkeypatch.setattr(run_date, "datetime", Later)
    before = stored.manifest["settings"]["responses"]["prompts"]
    fit(tmp_path / "run", llama, write_jsonl(rows), **options)
    assert stored.manifest["settings"]["responses"]["prompts"] == before
    for row in rows:
        row["prompt"][0] = ASK | {"name": "Ann"}  # the template ignores the name, rewards see it
    fit(tmp_path / "run", llama, write_jsonl(rows), **options)
    assert stored.manifest["settings"]["rewards"]["messages"] != settings["messages"]
    options["module"]["chat_template"] = template("QWEN")
    options["data"]["max_prompt_tokens"] = 500
    with pytest.raises(InputError, match="was made with other settings"):
        fit(
            tmp_path / "run", save_llama(tmp_path / "llama", max_position_embeddings=1024), write_jsonl(rows), **options
        )


def test_sft_learns_calls_and_respects_weights(
    llama: Path, tmp_path: Path, write_jsonl: Write, template: Callable[[str], str]
) -> None:
    talk = [ASK, call({"city": "Paris"}) | {"weight": 0}, RESULT, RESPONSE | {"weight": 1}]
    rows = [{"messages": talk, "tools": TOOLS}, {"messages": [ASK, RESPONSE | {"weight": 0}]}]
    module = SFTModule(str(save_llama(tmp_path / "m", max_position_embeddings=1024)), chat_template=template("QWEN"))
    data = set_up(module, SFTDataModule(write_jsonl(rows), val_conversations=0, max_tokens=1000), tmp_path)
    (example,) = data.examples
    assert tokenizer("QWEN").decode(example.ids) == plain("QWEN", talk, False, tools=TOOLS)
    learned = [token for token, learn in zip(example.ids, example.mask, strict=True) if learn]
    assert tokenizer("QWEN").decode(learned) == "22 degrees.<|end|>"
    assert "1 left out, with nothing to learn (weight 0)" in data.describe()


def test_comparisons_of_calls_are_rendered_and_scored_as_by_transformers(
    reward_model: Path, tmp_path: Path, write_jsonl: Write, template: Callable[[str], str]
) -> None:
    from transformers import AutoModelForSequenceClassification

    row = {"prompt": [ASK], "chosen": [call({"city": "Paris"})], "rejected": [call({"city": "Rome"})], "tools": TOOLS}
    module = RewardModelModule(str(reward_model), chat_template=template("QWEN"))
    data = set_up(module, PreferenceDataModule(write_jsonl([row]), val_preferences=0, max_tokens=512), tmp_path)
    texts = [plain("QWEN", [ASK, *row[side]], False, tools=TOOLS) for side in ("chosen", "rejected")]
    assert [tokenizer("QWEN").decode(r.ids) for r in data.train_set.rows[0]] == texts
    scorer = ClassifierReward(str(reward_model), chat_template=template("QWEN"))
    pair = data.train_set.pairs[0]
    samples = [Sample("p", pair.messages, "", message=r, tools=pair.tools) for r in pair.responses]
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    with torch.no_grad():
        inputs = [tokenizer("QWEN")(t, add_special_tokens=False, return_tensors="pt")["input_ids"] for t in texts]
        expected = [model(input_ids=ids).logits[0, 0].item() for ids in inputs]
    assert abs(expected[0] - expected[1]) > 1e-3
    assert [r.reward for r in scorer.score(samples)] == pytest.approx(expected, abs=1e-5)


def test_template_variables_in_every_data_module(
    llama: Path, reward_model: Path, tmp_path: Path, write_jsonl: Write, template: Callable[[str], str]
) -> None:
    closed, conversation = {"enable_thinking": False}, [ASK, RESPONSE]
    chat_template = template("THINKING")
    row = {"prompt": [ASK], "response": [RESPONSE], "chosen": [RESPONSE], "rejected": [RESPONSE | {"content": "No."}]}
    file = write_jsonl([row | {"chosen_reward": 1, "rejected_reward": 0}])
    sft = SFTDataModule(file, chat_template_kwargs=closed, val_conversations=0, max_tokens=256)
    offline = OfflineDataModule(file, chat_template_kwargs=closed)
    wrong: list[tuple[L.LightningModule, Callable[..., Any]]] = [
        (SFTModule(str(llama), chat_template=chat_template), partial(SFTDataModule, max_tokens=64)),
        (RebelModule(str(llama), chat_template=chat_template), OfflineDataModule),
        (RewardModelModule(str(reward_model), chat_template=chat_template), PreferenceDataModule),
    ]
    (example,) = set_up(wrong[0][0], sft, tmp_path).examples
    learned = [token for token, learn in zip(example.ids, example.mask, strict=True) if learn]
    assert tokenizer("THINKING").decode(learned) == "22 degrees.<|end|>"
    assert tokenizer("THINKING").decode(example.ids) == plain("THINKING", conversation, False)
    (pair,) = set_up(wrong[1][0], offline, tmp_path).train_set
    assert tokenizer("THINKING").decode(pair.prompt_tokens) == plain("THINKING", [ASK], enable_thinking=False)
    assert tokenizer("THINKING").decode(pair.tokens[0]) == "22 degrees.<|end|>"
    for module, make in wrong:
        with pytest.raises(InputError, match=r"`data.chat_template_kwargs` sets 'enable_thought'"):
            set_up(module, make(file, chat_template_kwargs={"enable_thought": False}), tmp_path)


def test_rewards_are_tried_on_every_kind_of_conversation(
    reward_model: Path, llama: Path, tmp_path: Path, write_jsonl: Write, template: Callable[[str], str]
) -> None:
    """A reward model that refuses a late row is an error before any model loads."""
    rows = [{"prompt": "Hi"}] * 40 + [{"prompt": [{"role": "system", "content": "Be kind."}, ASK]}]
    scorer = ClassifierReward(str(reward_model), chat_template=template("GEMMA"))
    with pytest.raises(InputError, match=r"System role not supported.*`system_prompt: drop`"):
        fit(tmp_path / "run", llama, write_jsonl(rows), data={"val_prompts": 0}, refresh={"reward": scorer})
    talk = [ASK, {"role": "assistant", "content": "Yes."}, ASK]
    rows = [{"prompt": "Hi"}] * 20 + [{"prompt": talk}] * 20 + [{"prompt": [*talk, ASK]}]
    with pytest.raises(InputError, match="roles must alternate"):
        fit(tmp_path / "run", llama, write_jsonl(rows), data={"val_prompts": 0}, refresh={"reward": scorer})
    assert not (tmp_path / "run" / "rounds").exists()
