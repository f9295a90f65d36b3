"""`docs/recipes.md` against the configs that it describes."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "recipes"


def read_tables() -> dict[str, list[tuple[str, str, str, str]]]:
    """The rows (option, theirs, ours, why) of each config."""
    tables: dict[str, list[tuple[str, str, str, str]]] = {}
    for line in (ROOT / "docs" / "recipes.md").read_text().splitlines():
        if line.startswith("## "):
            tables[line.removeprefix("## ")] = rows = []
        elif line.startswith("| `"):
            option, theirs, ours, why = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append((option.strip("`"), theirs.strip("`"), ours.strip("`"), why))
    return tables


def find(config: Any, option: str) -> Any:
    for key in option.split("."):
        config = config["init_args"] if key not in config and "init_args" in config else config
        config = config[key]
    return config


def test_every_recipe_has_a_table() -> None:
    assert sorted(read_tables()) == sorted(file.name for file in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(file.name for file in RECIPES.glob("*.yaml")))
def test_our_column_is_what_the_config_says(name: str) -> None:
    config = yaml.safe_load((RECIPES / name).read_text())
    for option, theirs, ours, why in read_tables()[name]:
        assert str(find(config, option)) == ours, option
        assert (theirs == ours) != bool(why), f"{option}: a reason stands where the values differ, and only there"


@pytest.mark.parametrize("name", sorted(file.name for file in RECIPES.glob("*.yaml")))
def test_every_number_of_optimizer_loss_and_sampling_is_in_the_table(name: str) -> None:
    """So that a number can't be added to a recipe without saying where it comes from."""
    config = yaml.safe_load((RECIPES / name).read_text())
    listed = {option for option, *_ in read_tables()[name]}
    numbers = [
        path
        for path in leaves(config, "")
        if re.match(r"model\.(optimizer|loss|lora|kl_coef)|rollout\.(sampling|shaping|val_temperature)", path)
        and not path.endswith("class_path")
    ]
    assert set(numbers) <= listed


def leaves(value: Any, path: str) -> list[str]:
    if not isinstance(value, dict):
        return [path]
    if "init_args" in value:
        value = value["init_args"]
    return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}".lstrip("."))]
