"""The docs name options, files and links that exist."""

import inspect
import json
import re
from pathlib import Path

import pytest

import rlhf_pl
from rlhf_pl import (
    Critic,
    LoRA,
    OfflineDataModule,
    PolicyLoss,
    PPOModule,
    PreferenceDataModule,
    RebelModule,
    RewardModelModule,
    RoundDataModule,
    SamplingConfig,
    SFTDataModule,
    SFTModule,
    SumOfLosses,
    TransformersSampler,
    VLLMSampler,
    rewards,
)
from rlhf_pl.algorithms.policy_loss import check_needs
from rlhf_pl.algorithms.prompt_groups import OLD_VALUES
from rlhf_pl.algorithms.reward_shaping import RewardShaping
from rlhf_pl.callbacks import DegenerationGuard, HFExport, OfflineLogps, RoundCheckpoint, RoundRefresh, SampleTable
from rlhf_pl.rewards import ScoringConfig

ROOT = Path(__file__).parents[2]
CLASSES = [RebelModule, RoundDataModule, RoundRefresh, SamplingConfig, VLLMSampler, TransformersSampler, SampleTable]
CLASSES += [RewardModelModule, SFTModule, PreferenceDataModule, SFTDataModule, OfflineDataModule, LoRA, RewardShaping]
CLASSES += [PPOModule, Critic]
CLASSES += [ScoringConfig, HFExport, RoundCheckpoint, DegenerationGuard, OfflineLogps]


def _is_loss(kind: object) -> bool:
    """Whether it is a loss of a policy that the command line can name."""
    return isinstance(kind, type) and issubclass(kind, PolicyLoss) and not inspect.isabstract(kind)


REWARDS = [getattr(rewards, n) for n in rewards.__all__ if n.endswith("Reward") and n not in ("Reward", "RuleReward")]
REWARDS += [rewards.ExactAnswer, rewards.NumericAnswer, rewards.RegexMatch, rewards.JSONSchema, rewards.LengthWindow]


@pytest.mark.parametrize("cls", [*CLASSES, *REWARDS], ids=lambda c: c.__name__)
def test_every_option_is_documented(cls: type) -> None:
    name_of_page = "rewards.md" if cls in REWARDS else "configuration.md"
    page = (ROOT / "docs" / name_of_page).read_text()
    for name in inspect.signature(cls).parameters:
        pattern = rf"\b{name}\b" if name == "rewards" else rf"[`.]{name}[`(]"
        assert re.search(pattern, page), f"docs/{name_of_page} does not mention `{name}` of {cls.__name__}"
        assert re.search(rf"^\s+{name}: ", cls.__doc__ or "", re.MULTILINE), f"{cls.__name__} does not explain `{name}`"


LOSSES = [kind for name in rlhf_pl.__all__ if _is_loss(kind := getattr(rlhf_pl, name))]


@pytest.mark.parametrize("cls", LOSSES, ids=lambda c: c.__name__)
def test_the_table_of_losses_says_what_they_declare(cls: type[PolicyLoss]) -> None:
    """References, rewards, and options with their defaults."""
    page = (ROOT / "docs" / "algorithms.md").read_text()
    row = re.search(rf"^\| `{cls.__name__}` \|(.*)\|(.*)\|(.*)\|(.*)\|.*\|$", page, re.MULTILINE)
    assert row is not None
    _, reference, rewards, options = (cell.strip() for cell in row.groups())
    parameters = list(inspect.signature(cls).parameters.values()) if cls.__init__ is not object.__init__ else []
    for parameter in parameters:
        written = f"`{parameter.name}`"
        if parameter.default is not parameter.empty:
            written += f" {json.dumps(parameter.default)}"
        assert written in options
        assert re.search(rf"^\s+{parameter.name}: ", cls.__doc__ or "", re.MULTILINE), parameter.name
    if cls is not SumOfLosses:
        required = {p.name: 16 for p in parameters if p.default is p.empty}
        needs = set(check_needs(cls(**required), 0.0, [OLD_VALUES]))
        known = "pi_old" if "old_logps" in needs else "pi_ref" if "reference_logps" in needs else "none"
        assert reference == known + ("; pi_ref with `kl`" if any(p.name == "kl" for p in parameters) else "")
        assert rewards == ("no" if "rewards" not in needs else "as labels" if cls.rewards_as_labels else "yes")


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))])
def test_links_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"`((?:configs|examples|docs|benchmarks|data)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))])
def test_anchors_exist(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", (ROOT / page).read_text()):
        text = ((ROOT / page).parent / target if target else ROOT / page).read_text()
        titles = [re.sub(r"[^\w -]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
        assert anchor in [title.replace(" ", "-") for title in titles], (target, anchor)


def test_the_readme_lists_the_folders_of_the_architecture() -> None:
    readme, architecture = (
        re.findall(r"^\| `(\w[\w/]+/)` \|", (ROOT / page).read_text(), re.MULTILINE)
        for page in ("README.md", "docs/architecture.md")
    )
    assert [folder for folder in readme if folder != "benchmarks/"] == architecture


def test_the_readmes_python_runs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small model, without vLLM, and with few prompts."""
    pattern = r"```python\n(from rlhf_pl import .*?RlhfTrainer.*?)```"
    code = re.search(pattern, (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    text = code[1]
    for old, new in {
        "models/SmolLM2-135M-Instruct": str(llama),
        "RoundRefresh(score,": "RoundRefresh(score, sampler=TransformersSampler(),",
        "prompts_per_round=64": "prompts_per_round=8, max_prompt_tokens=128",
        "max_epochs=3": "max_epochs=1",
        "runs/python": str(tmp_path / "run"),
    }.items():
        assert old in text
        text = text.replace(old, new)
    monkeypatch.chdir(ROOT)
    exec(text, {"TransformersSampler": TransformersSampler})
    assert "round 1: reward" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
