"""The docs name what there is."""

import inspect
import re
from pathlib import Path

import pytest

from rlhf_pl import RebelModule, RoundDataModule, SamplingConfig, TransformersSampler, VLLMSampler
from rlhf_pl.callbacks import HFExport, RoundRefresh, SampleTable

ROOT = Path(__file__).parents[1]
CLASSES = [RebelModule, RoundDataModule, RoundRefresh, SamplingConfig, VLLMSampler, TransformersSampler, SampleTable]


@pytest.mark.parametrize("cls", [*CLASSES, HFExport], ids=lambda c: c.__name__)
def test_every_option_is_documented(cls: type) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for name in inspect.signature(cls).parameters:
        assert re.search(rf"[`.]{name}`", page), f"docs/configuration.md does not mention `{name}` of {cls.__name__}"
        assert re.search(rf"^\s+{name}: ", cls.__doc__ or "", re.MULTILINE), f"{cls.__name__} does not explain `{name}`"


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md", "docs/how_it_works.md"])
def test_links_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for path in re.findall(r"`((?:configs|examples|docs|benchmarks|data)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
