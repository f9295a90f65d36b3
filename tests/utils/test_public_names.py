"""Public names of classes do not depend on their files, and old paths are mapped to them."""

import inspect
import json
import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import rlhf_pl
from rlhf_pl import BestWorst, PairSelector, PairwiseLoss, RebelLoss, Reward
from rlhf_pl.__main__ import main
from rlhf_pl.optim import AdamW, WarmupCosine
from rlhf_pl.rewards import ArmoRMReward, RegexMatch
from rlhf_pl.store.journal import Journal
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.by_path import import_path
from rlhf_pl.utils.fingerprints import describe
from rlhf_pl.utils.public_names import (
    public_name,
    public_path,
    with_public_descriptions,
    with_public_path,
    with_public_paths,
)

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "checkpointing" / "stored_runs"  # never edited
# paths that users' configs and code may import: docs, configs and `--help` have named them since the first version
PUBLIC = (STORED / "public_paths.txt").read_text()
# former paths of classes, which configs may contain
FORMER = (STORED / "old_paths.txt").read_text()


def listed(text: str) -> list[str]:
    """The paths in lines of the form `module: name name`."""
    found = re.findall(r"^(rlhf_pl[.\w]*):((?:\s+\w+)+)$", text, re.MULTILINE)
    return [f"{module}.{name}" for module, names in found for name in names.split()]


def imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def named_in_docs() -> set[str]:
    """Every path of this package in the docs, the configs and the examples that ends in a class."""
    folders = [ROOT / name for name in ("docs", "configs", "examples")]
    files = [
        ROOT / "README.md",
        *(f for folder in folders for f in folder.rglob("*") if f.suffix in (".md", ".yaml", ".py")),
    ]
    text = "\n".join(file.read_text() for file in files)
    paths = set(re.findall(r"\brlhf_pl(?:\.\w+)*\.[A-Z]\w*", text))
    for module, names in re.findall(r"^\s*from (rlhf_pl[.\w]*) import ([\w, ]+)$", text, re.MULTILINE):
        paths |= {f"{module}.{name}" for name in names.split(", ")}
    return paths


@pytest.mark.parametrize("path", listed(PUBLIC))
def test_a_public_path_imports(path: str) -> None:
    name = path.rpartition(".")[2]
    assert imported(path).__name__ == {"PairBatch": "GroupBatch"}.get(name, name)  # pairs have become groups of two


@pytest.mark.parametrize("path", FORMER.split())
def test_a_class_is_found_by_its_former_path(path: str) -> None:
    assert imported(public_path(path)).__name__ == path.rpartition(".")[2]


def test_classes_in_the_docs_can_be_imported() -> None:
    paths = named_in_docs()
    assert {"rlhf_pl.optim.AdamW", "rlhf_pl.RebelModule", "rlhf_pl.callbacks.StopOnSignal"} <= paths
    for path in paths:
        assert imported(public_path(path)).__name__ == path.rpartition(".")[2]


def test_names_of_classes_are_unique() -> None:
    """Former paths are mapped by the name of the class."""
    files = {file.resolve() for folder in ("rlhf_pl", "callbacks") for file in (ROOT / folder).rglob("*.py")}
    counts = Counter(n for file in files for n in re.findall(r"^class ([A-Z]\w*)", file.read_text(), re.MULTILINE))
    assert counts["RebelLoss"] == 1
    assert [name for name, count in counts.items() if count > 1] == []


def described_kinds() -> list[type]:
    """Every class of this package that a manifest may describe."""
    for path in listed(PUBLIC):
        imported(path)
    found, pending = [], [PairwiseLoss, PairSelector, Reward, LRScheduler, Optimizer]
    while pending:
        kind: Any = pending.pop()
        pending += kind.__subclasses__()
        is_ours = kind.__module__.startswith("rlhf_pl.") and not kind.__name__.startswith("_")
        found += [kind] if is_ours and not inspect.isabstract(kind) else []
    return found


def test_classes_in_manifests_have_public_names() -> None:
    kinds = described_kinds()
    assert {RebelLoss, BestWorst, ArmoRMReward, WarmupCosine, AdamW} <= set(kinds)
    modules = {path.rpartition(".")[0] for path in listed(PUBLIC)}
    for kind in (kind for kind in kinds if ".by_path." not in kind.__module__):  # users' files
        assert public_name(kind).rpartition(".")[0] in modules
        assert imported(public_name(kind)) is kind


def test_the_public_name_is_the_shortest() -> None:
    assert public_name(RebelLoss) == "rlhf_pl.RebelLoss"
    assert public_name(BestWorst) == "rlhf_pl.BestWorst"
    assert public_name(RegexMatch) == "rlhf_pl.rewards.RegexMatch"
    assert public_name(WarmupCosine) == "rlhf_pl.optim.WarmupCosine"
    assert set(rlhf_pl.__all__) - {"__version__"} == {public_path(f"rlhf_pl.x.{n}")[8:] for n in rlhf_pl.__all__[:-1]}


class Half(RebelLoss):
    """A user's own class."""


class MyBestWorst(BestWorst):
    """Another."""


def test_a_users_class_keeps_its_path() -> None:
    assert describe(Half(2.0)) == f"{__name__}.Half(eta=2.0)"
    assert public_name(MyBestWorst) == f"{__name__}.MyBestWorst"
    for path in (
        "mine.RebelLoss",
        "my.rlhf_pl.RebelLoss",
        "rlhf_pl.utils.by_path.mine_2f.RebelLoss",
        "rlhf_plus.x.RebelLoss",
    ):
        assert public_path(path) == path
        assert with_public_descriptions(f"{path}(eta=1.0)") == f"{path}(eta=1.0)"


def test_a_users_class_is_not_mistaken_for_one_with_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("class RebelLoss:\n    pass\n")
    kind = import_path(str(tmp_path / "mine.py")).RebelLoss
    assert kind.__module__.startswith("rlhf_pl.")
    assert public_name(kind) == f"{kind.__module__}.RebelLoss"
    assert with_public_descriptions([describe(kind())]) == [describe(kind())]


def test_other_texts_are_unchanged() -> None:
    for text in ("rlhf_pl.gone.NoLoss", "rlhf_pl.gone.rebel_loss", "RebelLoss", "see rlhf_pl.gone.RebelLoss", ""):
        assert public_path(text) == text
        assert with_public_paths([text, 1, None]) == [text, 1, None]


def test_old_settings_are_mapped_to_public_names() -> None:
    old = {
        "rewards": {"reward": "CombinedReward(a: 0.5 * rlhf_pl.rewards.gone.RegexMatch(pattern='(x)'), b: f.py:g:1)"},
        "pairs": {"selector": "rlhf_pl.gone.BestWorst(min_margin=0.0)", "limit": None},
        "training": {"loss": describe(RebelLoss(2.0)).replace("rlhf_pl.", "rlhf_pl.gone."), "betas": [0.9, 0.95]},
    }
    assert with_public_descriptions(old) == {
        "rewards": {"reward": "CombinedReward(a: 0.5 * rlhf_pl.rewards.RegexMatch(pattern='(x)'), b: f.py:g:1)"},
        "pairs": {"selector": "rlhf_pl.BestWorst(min_margin=0.0)", "limit": None},
        "training": {"loss": "rlhf_pl.RebelLoss(eta=2.0)", "betas": [0.9, 0.95]},
    }


def test_a_manifest_is_read_with_public_names(tmp_path: Path) -> None:
    stored = RoundStore(tmp_path).round(0)
    old = {"responses": {}, "training": {"loss": "rlhf_pl.gone.RebelLoss(eta=1.0)"}}
    stored.update(settings=old, accepted=old)
    file = tmp_path / "rounds" / "0000" / "manifest.json"
    assert json.loads(file.read_text())["settings"] == old
    for name in ("settings", "accepted"):
        assert stored.manifest[name]["training"]["loss"] == "rlhf_pl.RebelLoss(eta=1.0)"


def test_a_journal_with_old_names_is_continued(tmp_path: Path) -> None:
    file = tmp_path / "_00000.journal"
    Journal(file, ["a.parquet", "rlhf_pl.rewards.gone.HTTPReward(url='u')"]).add([["result", 1.0, {}, 0]])
    journal = Journal(file, ["a.parquet", "rlhf_pl.rewards.HTTPReward(url='u')"])
    assert journal.read() == [["result", 1.0, {}, 0]]
    journal.add([["result", 2.0, {}, 0]])
    assert journal.read() == [["result", 1.0, {}, 0], ["result", 2.0, {}, 0]]
    assert Journal(file, ["a.parquet", "rlhf_pl.rewards.HTTPReward(url='v')"]).read() == []


# paths of files that do not exist
OLD_CONFIG = """
model:
  class_path: rlhf_pl.gone.rebel.RebelModule
  init_args:
    policy: m
    loss: {class_path: rlhf_pl.gone.RebelLoss, init_args: {eta: 3.0}}
    optimizer: {class_path: rlhf_pl.gone.AdamW, init_args: {lr: 0.5}}
    lora: {class_path: rlhf_pl.gone.LoRA, init_args: {rank: 2}}
data: {class_path: rlhf_pl.gone.RoundDataModule, init_args: {prompts: p}}
rollout:
  selector: rlhf_pl.gone.RandomPair
  reward: {class_path: rlhf_pl.gone.RegexMatch, init_args: {pattern: a}}
trainer: {callbacks: [{class_path: rlhf_pl.gone.round_progress.RoundProgress}]}
"""


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """The config of a command line."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_old_paths_in_a_config_are_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old.yaml").write_text(OLD_CONFIG)
    config = shown(["--config", str(tmp_path / "old.yaml")], capsys)
    model = config["model"]["init_args"]
    assert config["model"]["class_path"] == "rlhf_pl.RebelModule"
    assert (model["loss"]["class_path"], model["loss"]["init_args"]["eta"]) == ("rlhf_pl.RebelLoss", 3.0)
    assert model["optimizer"]["class_path"] == "rlhf_pl.optim.AdamW"
    assert model["optimizer"]["init_args"]["lr"] == 0.5
    assert "rank: 2" in yaml.safe_dump(model["lora"])
    assert config["data"]["class_path"] == "rlhf_pl.RoundDataModule"
    assert config["rollout"]["selector"]["class_path"] == "rlhf_pl.RandomPair"
    assert config["rollout"]["reward"]["class_path"] == "rlhf_pl.rewards.RegexMatch"
    assert config["trainer"]["callbacks"][0]["class_path"] == "rlhf_pl.callbacks.RoundProgress"


def test_old_paths_in_flags_are_mapped(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--model=rlhf_pl.gone.RebelModule",
        "--model.policy=m",
        "--data.prompts",
        "p",
        "--rollout.reward",
        "f.py:g",
    ]
    given += [
        "--rollout.reward=f.py:g",
        "--model.loss",
        '{"class_path": "rlhf_pl.gone.RebelLoss", "init_args": {"eta": 4.0}}',
    ]
    given += ["--rollout.selector", "rlhf_pl.gone.RandomPair", "--trainer.callbacks+=rlhf_pl.gone.RoundProgress"]
    config = shown(given, capsys)
    loss = config["model"]["init_args"]["loss"]
    assert (loss["class_path"], loss["init_args"]["eta"]) == ("rlhf_pl.RebelLoss", 4.0)
    assert config["rollout"]["selector"]["class_path"] == "rlhf_pl.RandomPair"
    assert config["trainer"]["callbacks"][0]["class_path"] == "rlhf_pl.callbacks.RoundProgress"
    assert with_public_path("--data.system_prompt=See rlhf_pl.gone.RebelLoss") == (
        "--data.system_prompt=See rlhf_pl.gone.RebelLoss"
    )


@pytest.mark.parametrize(
    "given", ["--rollout.selector.min_margin=0.5", "--rollout.selector={init_args: {min_margin: 0.5}}"]
)
def test_a_margin_without_a_class_is_that_of_the_default_selector(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shown(["--model.policy=m", "--data.prompts=p", "--rollout.reward=f.py:g", given], capsys)
    assert config["rollout"]["selector"] == {"class_path": "rlhf_pl.BestWorst", "init_args": {"min_margin": 0.5}}
