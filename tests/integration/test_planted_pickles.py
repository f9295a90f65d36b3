"""Pickles in every kind of file that a command may read: the real commands run none of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_pl.__main__ import main
from rlhf_pl.data.files import read_rows
from rlhf_pl.utils.errors import InputError
from tests import pickles
from tests.conftest import save_llama, save_reward_model

REWARD = "def score(response):\n    return float(len(set(response)))\n"
EXTRA_FILES = [  # files that trainers leave in model folders and transformers does not read
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "tokenizer.pkl"),
    *("adapter_model.bin", "vocab.pkl", "model.pt", "model.joblib", "model.npy", "model.ckpt", "trainer_state.pkl"),
]
CODE = "open({mark!r}, 'w')\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a reward, prompts and conversations."""
    (tmp_path / "planted_reward.py").write_text(REWARD)
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def fit(model: Path, run: str = "run", **options: Any) -> int:
    given = {
        **{"model.policy": model, "data.prompts": "rows.jsonl", "data.max_prompt_tokens": 40, "data.batch_size": 2},
        **{"rollout.reward": "planted_reward.score", "rollout.sampler": "TransformersSampler"},
        **{"rollout.sampling.num_responses": 2, "rollout.sampling.max_response_tokens": 4},
        **{"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "trainer.default_root_dir": run},
        **{"trainer.enable_progress_bar": "false", **options},
    }
    flags = ["--repair"] if given.pop("repair", False) else []
    return main(["fit", *flags, *(f"--{name}={value}" for name, value in given.items())])


def score(reward: str, data: str = "rows.jsonl") -> int:
    return main(["score", f"--reward={reward}", f"--data={data}"])


def plant_beside_model(folder: Path, mark: Path) -> None:
    """Write pickles and code beside a model, under all names that a library might load."""
    for name in EXTRA_FILES:
        content = (
            pickles.make_torch(mark) if name.endswith((".bin", ".pt", ".pth", ".ckpt")) else pickles.make_pickle(mark)
        )
        (folder / name).write_bytes(pickles.make_npy(mark) if name.endswith(".npy") else content)
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(mark=str(mark)) + "class Evil: ...\n")
    for name, kinds in (
        ("config.json", {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil",
                         "AutoModelForSequenceClassification": "modeling_evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]}),
    ):  # fmt: skip
        content = json.loads((folder / name).read_text())
        content |= {"auto_map": kinds, "attn_implementation": "nobody/kernel"} if name == "config.json" else {
            "auto_map": kinds}  # fmt: skip
        (folder / name).write_text(json.dumps(content))


def test_pickles_beside_a_policy_and_a_reward_model_are_not_loaded(place: Path) -> None:
    mark = place / "ran"
    policy, reward = save_llama(place / "policy"), save_reward_model(place / "reward")
    plant_beside_model(policy, mark)
    plant_beside_model(reward, mark)
    assert fit(policy) == 0
    assert (place / "run" / "model" / "model.safetensors").is_file()
    assert score(f"{{class_path: ClassifierReward, init_args: {{model: {reward}, device: cpu}}}}") == 0
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "tokenizer_config.json",
     "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
     "adapter_config.json", "model.safetensors.index.json", "model.gguf"],
)  # fmt: skip
def test_a_pickle_in_place_of_a_file_of_a_model_does_not_run(
    place: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = place / "ran"
    for model, command in (
        (save_llama(place / "policy"), lambda folder: fit(folder)),
        (save_reward_model(place / "reward"), lambda folder: score(
            f"{{class_path: ClassifierReward, init_args: {{model: {folder}, device: cpu}}}}")),
    ):  # fmt: skip
        if name in ("pytorch_model.bin", "model.safetensors.index.json", "model.gguf"):
            (model / "model.safetensors").unlink()
        as_torch = name == "pytorch_model.bin"
        (model / name).write_bytes(pickles.make_torch(mark) if as_torch else pickles.make_pickle(mark))
        code = command(model)
        error = capsys.readouterr().err
        if (model.name, name) != ("reward", "chat_template.jinja"):
            # a reward model has no generation config, and nothing reads one beside it
            assert code == 1
        assert code == 0 or (error.startswith("error: ") and error.count("error: ") == 1)
        assert not mark.exists()
    assert not (place / "run").exists()


def plant_ckpt_zip(run: Path, mark: Path) -> None:
    _find_newest(run).write_bytes(pickles.make_torch(mark, {"global_step": 9}))


def plant_ckpt_raw(run: Path, mark: Path) -> None:
    _find_newest(run).write_bytes(pickles.make_pickle(mark))


def plant_folder(run: Path, mark: Path) -> None:
    """Plant a checkpoint folder that is newer than the others and complete by its own list."""
    import torch

    content = torch.load(_find_newest(run), weights_only=True)
    folder = run / "checkpoints" / "after-round-0002.ckpt"
    folder.mkdir()
    content["global_step"] += 100
    torch.save({k: v for k, v in content.items() if k not in ("state_dict", "optimizer_states")}, folder / "meta.pt")
    (folder / ".metadata").write_bytes(pickles.make_pickle(mark))
    (folder / "__0_0.distcp").write_bytes(pickles.make_pickle(mark))
    (folder / "files.json").write_text(json.dumps({f.name: f.stat().st_size for f in folder.iterdir()}))


def plant_everywhere_else(run: Path, mark: Path) -> None:
    for file in sorted(run.rglob("*")):
        if file.is_file() and "checkpoints" not in file.parts:
            file.write_bytes(pickles.make_pickle(mark))
    for name in ("hparams.yaml", "evil.pkl", "checkpoints/evil.ckpt", "rounds/0000/evil.pkl", "rounds/evil.npy"):
        (run / name).write_bytes(pickles.make_pickle(mark))
    (run / "hparams.yaml").write_text(f"!!python/object/apply:builtins.open ['{mark}', w]\n")


def _find_newest(run: Path) -> Path:
    return (run / "checkpoints" / "last.ckpt").resolve()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a run of one round."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "planted_reward.py").write_text(REWARD)
        rows = [{"prompt": f"What is {i}?"} for i in range(4)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert fit(save_llama(folder / "policy")) == 0
    return folder


@pytest.mark.parametrize("plant", [plant_ckpt_zip, plant_ckpt_raw, plant_folder, plant_everywhere_else])
@pytest.mark.parametrize("repair", [False, True])
def test_a_run_directory_with_pickles_is_opened_without_running_them(
    place: Path, finished: Path, plant: Callable[[Path, Path], None], repair: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = place / "ran"
    shutil.copytree(finished / "run", place / "run", symlinks=True)
    plant(place / "run", mark)
    code = fit(finished / "policy", **{"repair": repair})
    error = capsys.readouterr().err
    assert not mark.exists()
    assert code == 0 or (code == 1 and error.count("error: ") == 1), error
    assert main(["rounds", "run", "--verify"]) in (0, 1)
    assert main(["rounds", "run", "--round", "1", "--samples", "1"]) in (0, 1)
    assert not mark.exists()


def test_a_named_checkpoint_folder_with_pickles_is_refused(
    place: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = place / "ran"
    shutil.copytree(finished / "run", place / "run", symlinks=True)
    plant_folder(place / "run", mark)
    folder = (place / "run" / "checkpoints" / "after-round-0002.ckpt").rename(place / "evil.ckpt")
    assert fit(finished / "policy", **{"ckpt_path": folder, "trainer.max_epochs": 2}) == 1
    error = capsys.readouterr().err
    assert "evil.ckpt/.metadata" in error
    assert error.count("error: ") == 1
    assert not mark.exists()


SUFFIXES = [
    "jsonl",
    "json",
    "csv",
    "parquet",
    "pkl",
    "pickle",
    "npy",
    "npz",
    "pt",
    "bin",
    "arrow",
    "joblib",
    "h5",
    "tar",
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_data_files_that_are_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    mark, file = tmp_path / "ran", tmp_path / f"data.{suffix}"
    for content in (
        pickles.make_pickle(mark),
        pickles.make_torch(mark),
        pickles.make_npy(mark),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match="data"):
            [r for _, row in read_rows(str(file), "train", "data.prompts") for r in _check_row(row)]
    (tmp_path / "set").mkdir(exist_ok=True)
    file.rename(tmp_path / "set" / file.name)
    with pytest.raises(InputError, match="folder"):
        list(read_rows(str(tmp_path / "set"), "train", "data.prompts"))
    assert not mark.exists()


def _check_row(row: Any) -> list[Any]:
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict) or "prompt" not in row:
        raise InputError("the data has no prompt")
    return [row]


def test_a_parquet_file_with_a_pickled_type_gives_its_plain_values(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "data.parquet"
    note = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickles.make_pickle(mark),
    }
    field = pa.field("prompt", pa.string(), metadata=note)
    schema = pa.schema(
        [field],
        metadata={b"pandas": pickles.make_pickle(mark), b"huggingface": pickles.make_pickle(mark)},
    )
    pq.write_table(pa.table([pa.array(["What?"])], schema=schema), file)
    assert [row for _, row in read_rows(str(file), "train", "data.prompts")] == [{"prompt": "What?"}]
    assert not mark.exists()


def test_a_config_file_with_a_yaml_object_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = place / "ran"
    (place / "evil.yaml").write_text(f"model: !!python/object/apply:builtins.open ['{mark}', w]\n")
    assert main(["fit", "--config", "evil.yaml"]) == 1
    assert "error" in capsys.readouterr().err
    assert not mark.exists()
