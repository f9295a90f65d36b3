"""Valid model folders of other programs and earlier versions must load; invalid ones are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_pl.models.classifier_head import check_classifier, check_new_classifier
from rlhf_pl.models.policy import check_lm, load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_llama, save_reward_model


def with_config(**changes: Any) -> Callable[[Path], None]:
    """A change of the config."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def as_bin(zipped: bool = True, only: Callable[[dict[str, Any]], Any] = lambda state: state) -> Callable[[Path], None]:
    """A conversion of the weights to `pytorch_model.bin`, in the current format or that of torch before 1.6."""

    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(only(state), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    return change


def with_head_twice(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")


def with_unused_index(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text("version https://git-lfs.github.com/spec/v1")


VALID: dict[str, Callable[[Path], None]] = {
    "bin": as_bin(),
    "legacy bin": as_bin(zipped=False),
    "other values beside tensors": as_bin(only=lambda state: state | {"epoch": 3}),
    "tied head stored too": with_head_twice,
    "unused index": with_unused_index,
    "training steps": with_config(training_steps=100_000, warmup_steps=2000),
    "no pad token": with_config(pad_token_id=-1),
}


@pytest.mark.parametrize("kind", VALID)
def test_a_valid_folder_loads_the_same_model(tmp_path: Path, source: ModelSource, kind: str) -> None:
    folder = save_llama(tmp_path / "model")
    VALID[kind](folder)
    check_lm(ModelSource(str(folder)))
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():
        assert torch.equal(load_lm(ModelSource(str(folder)))(ids).logits, load_lm(source)(ids).logits)


@pytest.mark.parametrize("kind", ["legacy bin", "other values beside tensors", "unused index"])
def test_reward_models_in_such_folders_are_accepted(tmp_path: Path, kind: str) -> None:
    reward, backbone = save_reward_model(tmp_path / "reward"), save_llama(tmp_path / "backbone")
    VALID[kind](reward)
    VALID[kind](backbone)
    check_classifier(ModelSource(str(reward)))
    check_new_classifier(ModelSource(str(backbone)))


def test_minus_one_positions_mean_no_limit(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    with_config(max_position_embeddings=-1)(folder)  # as in XLNet's config
    assert ModelSource(str(folder)).max_context_tokens == 2**31


@pytest.mark.parametrize("content", [[1, 2], None, torch.ones(2)])
def test_weights_that_are_not_tensors_by_name_are_refused(tmp_path: Path, content: Any) -> None:
    folder = save_llama(tmp_path / "model")
    as_bin(only=lambda state: content)(folder)
    with pytest.raises(InputError, match=r"pytorch_model\.bin holds a"):
        check_lm(ModelSource(str(folder)))


@pytest.mark.parametrize("settings", [{}, {"quant_method": "nothing"}, {"load_in_8bit": "x"}, "x"])
def test_a_broken_quantization_is_refused_before_weights_are_read(tmp_path: Path, settings: Any) -> None:
    folder = save_llama(tmp_path / "model")
    with_config(quantization_config=settings)(folder)
    with pytest.raises(InputError, match=r"config\.json"):
        check_lm(ModelSource(str(folder)))


@pytest.mark.parametrize("changes", [{"return_dict": False}, {"sub_configs": 5}])
def test_a_config_that_breaks_the_model_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = save_llama(tmp_path / "model")
    with_config(**changes)(folder)
    with pytest.raises(InputError, match=r"config\.json"):
        load_lm(ModelSource(str(folder)))


@pytest.mark.parametrize("template", [5, []])
def test_a_chat_template_that_is_not_text_is_refused(tmp_path: Path, template: Any) -> None:
    folder = save_llama(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    with pytest.raises(InputError, match=r"chat template|tokenizer_config"):
        _ = ModelSource(str(folder)).tokenizer
