"""Strict reading of config files."""

import json
import time
from pathlib import Path

import pytest
import yaml
from jsonargparse import _loaders_dumpers

from rlhf_pl.__main__ import main
from rlhf_pl.cli.config_text import load_yaml
from rlhf_pl.data.files import read_rows
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.unique_keys import DuplicateKeyError, loads

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
WRONG = {
    "model: {policy: m}\ndata:\n  batch_size: 1\ndata:\n  batch_size: 2\n": "line 4: `data` is given twice",
    "model:\n  policy: a\n  optimizer: {lr: 1, lr: 2}\n": "line 3: `lr` is given twice, first in line 3",
    '{"model": {"policy": "a"},\n "model": {"policy": "b"}}': "line 2: `model` is given twice",
    "a: 1\n? a\n: 2\n": "line 2: `a` is given twice",
    "trainer:\n- {a: 1, 'a': 2}\n": "line 2: `a` is given twice",
    "model: &a\n  policy: *a\n": "line 2: the alias `*a` is inside of the value that it refers to",
    "model: &a [1, [*a]]\n": "line 1: the alias `*a` is inside",
    "? &a {*a : 1}\n: 2\n": "line 1: the alias `*a` is inside",
    LAUGHS: "aliases expand to more than 10,000 values",
    "model: " + "[" * 100_000: "line 1: values are nested more than 100 deep",
    "model: *nowhere\n": "line 1: found undefined alias",
    "model:\n\tpolicy: m\n": "line 2: found character",
    "model: !!python/object:os.system {}\n": "line 1: could not determine a constructor",
    "--- {a: 1}\n--- {b: 2}\n": "line 2: but found another document",
    "- a\n- b\n": "holds list; expected options",
    "just text": "holds str; expected options",
}


@pytest.mark.parametrize("text", list(WRONG), ids=range(len(WRONG)))
def test_the_error_for_a_config_file_names_its_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    started = time.monotonic()
    assert main(["fit", "--config", str(file), "--model.policy", "m"]) == 1
    assert time.monotonic() - started < 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}")
    assert WRONG[text] in error
    assert len(error.splitlines()) == 1


def test_a_file_within_a_config_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.yaml").write_text("policy: m\nkl_coef: 0\nkl_coef: 1\n")
    (tmp_path / "run.yaml").write_text("model: model.yaml\n")
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 1
    assert "model.yaml, line 3: `kl_coef` is given twice, first in line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "base: &b {x: 1, y: [1, 2]}\nuse: {<<: *b, x: 2}\nlist: [*b, *b]\n",
        "a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: [*a, *b], x: 3}\n",
        "a: {x: 1}\nb: {x: 1}\n",
        "a: 1e-6\nb: 2001-01-01\nc: yes\nd: null\n",
        "1: a\n'1': b\n",
        json.dumps({"a": [{"x": 1}, {"x": 2}]}),
        "key:",
        "{a, b}",
        "",
        "word",
        "12",
    ],
)
def test_valid_text_is_read_as_jsonargparse_does(text: str) -> None:
    assert load_yaml(text) == _loaders_dumpers.yaml_load(text)


def test_invalid_yaml_in_an_option_is_left_to_its_type() -> None:
    with pytest.raises(yaml.YAMLError):
        load_yaml("User: hello\nUser: again")


def test_several_config_files_may_set_the_same_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.yaml").write_text(f"model: {{policy: m}}\ndata: {{prompts: p, batch_size: {number}}}\n")
    files = [text for number in (1, 2) for text in ("--config", str(tmp_path / f"{number}.yaml"))]
    with pytest.raises(SystemExit):
        main(["fit", *files, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["batch_size"] == 2


def test_an_object_with_a_duplicate_key_is_a_wrong_row(tmp_path: Path) -> None:
    assert loads('{"a": {"b": 1}, "c": [{"b": 1}, {"b": 2}]}') == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 2}]}
    with pytest.raises(DuplicateKeyError, match="'b' is given twice"):
        loads('{"a": [{"b": 1, "b": 2}]}')
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n')
    (_, first), (where, second) = read_rows(str(file), "train", "data.prompts")
    assert first == {"prompt": "a"}
    assert where == "line 2"
    assert isinstance(second, InputError)
    assert "'prompt' is given twice" in str(second)
    file = tmp_path / "rows.json"
    file.write_text('[{"prompt": "a", "prompt": "b"}]')
    with pytest.raises(InputError, match="given twice"):
        list(read_rows(str(file), "train", "data.prompts"))
