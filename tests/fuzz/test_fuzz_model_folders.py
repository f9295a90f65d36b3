"""Damaged model folders: each loads unchanged, or one message names the file before anything is written."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_pl.__main__ import main
from rlhf_pl.models.chat_template import ChatTemplate
from rlhf_pl.models.classifier_head import check_classifier, check_new_classifier
from rlhf_pl.models.policy import check_lm, load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_llama, save_reward_model

Fault = Callable[[Path], object]
MESSAGES = [{"role": "user", "content": "Tell me: 3 < 5?"}]

EVERY_FILE: dict[str, Fault] = {
    "empty": lambda f: f.write_bytes(b""),
    "zeros": lambda f: f.write_bytes(bytes(f.stat().st_size)),
    "garbage": lambda f: f.write_bytes(bytes(range(256)) * 20),
    "half": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "less": lambda f: f.write_bytes(f.read_bytes()[:-2]),
    "html": lambda f: f.write_text("<html>404 Not Found</html>"),
    "pointer": lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"),
    "folder": lambda f: (f.unlink(), f.mkdir()),
    "link": lambda f: (f.unlink(), f.symlink_to("nothing")),
}
EVERY_JSON = {"list": "[]", "null": "null", "text": '"x"', "nan": "NaN", "deep": '{"a":' + "[" * 100_000}
NUMBERS: list[Any] = [0, -1, "x", 1e30, float("nan"), float("inf"), [], {}, 2**40, 1.5]
VALID_CHANGES = (  # indistinguishable from an intended value
    *(("config.json", "eos_token_id", 0), ("generation_config.json", "eos_token_id", 0)),
    *(("generation_config.json", "eos_token_id", []), ("generation_config.json", "eos_token_id", 2**40)),
    *(("tokenizer_config.json", name, "x") for name in ("bos_token", "eos_token")),
)


def remove_tensor(name: str) -> Fault:
    return lambda f: save_file({n: t for n, t in load_file(f).items() if n != name}, f, metadata={"format": "pt"})


def reshape_tensor(name: str, shape: tuple[int, ...]) -> Fault:
    return lambda f: save_file({**load_file(f), name: torch.ones(shape)}, f, metadata={"format": "pt"})


def lengthen_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes((2**60).to_bytes(8, "little") + content[8:])


def change_offsets(file: Path) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["model.norm.weight"]["data_offsets"] = [0, 10**12]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


WEIGHTS: dict[str, Fault] = {
    "lacks a layer's tensor": remove_tensor("model.layers.1.mlp.up_proj.weight"),
    "lacks the embeddings": remove_tensor("model.embed_tokens.weight"),
    "lacks the norm": remove_tensor("model.norm.weight"),
    "another shape": reshape_tensor("model.layers.0.mlp.up_proj.weight", (7, 64)),
    "a scalar": reshape_tensor("model.norm.weight", ()),
    "a layer more": lambda f: save_file(
        load_file(f) | {n.replace("layers.1", "layers.2"): t for n, t in load_file(f).items() if "layers.1" in n},
        f, metadata={"format": "pt"}),
    "a longer header": lengthen_header,
    "offsets beyond the end": change_offsets,
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("fuzz") / "sound")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Path:
    """The same model in two files with an index."""
    folder = tmp_path_factory.mktemp("fuzz") / "sharded"
    shutil.copytree(sound, folder)
    state = load_file(folder / "model.safetensors")
    parts = {"one.safetensors": {}, "two.safetensors": {}}  # type: dict[str, dict[str, Any]]
    for i, (name, tensor) in enumerate(state.items()):
        parts[list(parts)[i % 2]][name] = tensor
    for name, tensors in parts.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: name for name, tensors in parts.items() for n in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def list_faults(folder: Path) -> Iterator[tuple[str, str, Fault]]:
    """List (file name, name of the fault, fault) for a model folder."""
    for file in sorted(folder.iterdir()):
        for what, damage in EVERY_FILE.items():
            yield file.name, what, damage
        if file.suffix == ".json":
            for what, text in EVERY_JSON.items():
                yield file.name, what, lambda f, text=text: f.write_text(text)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        if name == "config.json":
            content = {key: value for key, value in content.items() if type(value) in (int, float, list)}
        for key in content:
            for number in NUMBERS:
                if not any(name == n and key == k and number == v for n, k, v in VALID_CHANGES):
                    yield name, f"{key}={number!r}", set_value(key, number)
    yield "config.json", "rope_theta", set_value("rope_parameters", {"rope_type": "default", "rope_theta": 0.0})
    yield "config.json", "more layers", set_value("num_hidden_layers", 3)
    yield "config.json", "fewer layers", set_value("num_hidden_layers", 1)


def set_value(key: str, value: Any) -> Fault:
    return lambda f: f.write_text(json.dumps(json.loads(f.read_text()) | {key: value}))


def load_all(folder: Path) -> tuple[str, torch.Tensor]:
    """Load everything that a run reads before it writes; returns a rendered prompt and the logits of a row."""
    source = ModelSource(str(folder))
    template = ChatTemplate(source.tokenizer)
    text = template.render(template.prepare(MESSAGES), None, True)
    _ = source.eos_token_ids, source.max_context_tokens
    check_lm(source)
    with torch.no_grad():
        return text, load_lm(source)(torch.tensor([[1, 5, 9, 33]])).logits


def test_a_damaged_folder_loads_unchanged_or_is_refused_by_the_files_name(
    tmp_path: Path, sound: Path, sharded: Path
) -> None:
    text, logits = load_all(sound)
    wrong, tried, refused = [], 0, 0
    every = [(sound, *damage) for damage in list_faults(sound)]
    every += [(sound, "model.safetensors", what, damage) for what, damage in WEIGHTS.items()]
    every += [
        (sharded, n, what, d) for n, what, d in list_faults(sharded) if n.endswith((".index.json", ".safetensors"))
    ]
    every += [(sharded, "one.safetensors", "gone", Path.unlink)]
    for weight_map in ({}, {"model.norm.weight": "../one.safetensors"}, {"x": "one.safetensors"}, []):
        index = "model.safetensors.index.json"
        every.append((sharded, index, f"weight_map {weight_map}", set_value("weight_map", weight_map)))
    for source, name, what, damage in every:
        folder = tmp_path / "model"
        shutil.copytree(source, folder)
        damage(folder / name)
        tried += 1
        try:
            found_text, found = load_all(folder)
            if found_text != text or not torch.allclose(found, logits):
                wrong.append(f"{name}, {what}: loads as another model")
        except InputError as error:
            refused += 1
            names = {name, "chat template"} if name.endswith((".jinja", "tokenizer_config.json")) else {name}
            if not any(part in str(error) for part in names) or "\n" in str(error):
                wrong.append(f"{name}, {what}: {error}")
        except Exception as error:
            wrong.append(f"{name}, {what}: {type(error).__name__}: {error}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert tried >= 250
    assert refused >= 150


def test_reward_models_are_refused_by_the_same_rules(tmp_path: Path) -> None:
    sound = save_reward_model(tmp_path / "sound")
    check_classifier(ModelSource(str(sound)))
    check_new_classifier(ModelSource(str(save_llama(tmp_path / "backbone"))))
    for what, damage in {
        **WEIGHTS,
        **{name: EVERY_FILE[name] for name in ("empty", "half", "less", "garbage")},
    }.items():
        for kind in ("sound", "backbone"):
            folder = tmp_path / "model"
            shutil.copytree(tmp_path / kind, folder)
            damage(folder / "model.safetensors")
            with pytest.raises(InputError, match=r"model\.safetensors|lacks the head"):
                (check_classifier if kind == "sound" else check_new_classifier)(ModelSource(str(folder)))
            assert what
            shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["policy", "reference", "sft", "backbone", "plan", "score"])
@pytest.mark.parametrize("damage", ["lacks a layer's tensor", "half", "config"])
def test_every_command_refuses_before_a_run_directory_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "folder_reward.py").write_text("def score(response):\n    return float(len(set(response)))\n")
    rows = [{"prompt": f"What is {i}?", "response": "x", "chosen": f"{i}", "rejected": "no"} for i in range(4)]
    for name, keys in (("p", ("prompt",)), ("s", ("prompt", "response")), ("c", ("prompt", "chosen", "rejected"))):
        text = "".join(json.dumps({k: row[k] for k in keys}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    bad = (save_reward_model if kind == "score" else save_llama)(tmp_path / "bad")
    good = save_llama(tmp_path / "good") if kind == "reference" else bad
    file = bad / ("config.json" if damage == "config" else "model.safetensors")
    (set_value("hidden_size", 96) if damage == "config" else {**WEIGHTS, **EVERY_FILE}[damage])(file)
    rounds = ["--data.prompts=p.jsonl", "--data.max_prompt_tokens=40", "--rollout.reward=folder_reward.score",
              "--rollout.sampler=TransformersSampler", "--rollout.sampling.max_response_tokens=4"]  # fmt: skip
    arguments = {
        "policy": ["fit", f"--model.policy={bad}", *rounds],
        "plan": ["plan", f"--model.policy={bad}", *rounds],
        "reference": ["fit", f"--model.policy={good}", f"--model.reference={bad}", "--model.kl_coef=0.1", *rounds],
        "sft": ["fit", "--model=SFTModule", f"--model.policy={bad}", "--data=SFTDataModule",
                "--data.conversations=s.jsonl", "--data.max_tokens=64"],
        "backbone": ["fit", "--model=RewardModelModule", f"--model.backbone={bad}", "--data=PreferenceDataModule",
                     "--data.preferences=c.jsonl", "--data.max_tokens=64"],
        "score": ["score", f"--reward={{class_path: ClassifierReward, init_args: {{model: {bad}, device: cpu}}}}",
                  "--data=s.jsonl"],
    }[kind]  # fmt: skip
    if arguments[0] == "fit":
        arguments += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.default_root_dir=run"]
    if arguments[0] == "plan":
        arguments += ["--trainer.accelerator=cpu"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert file.name in error
    assert not (tmp_path / "run").exists()
