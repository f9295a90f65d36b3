"""The contents of the wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_has_the_callbacks_once(tmp_path: Path) -> None:
    """The folder `callbacks/` at the root must become `rlhf_pl/callbacks/` in the wheel, and nothing else."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("rlhf_pl", "callbacks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, text=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    package = ROOT / "rlhf_pl"
    files = [*package.rglob("*.py"), *(package / "callbacks").glob("*.py")]
    assert {f"rlhf_pl/{file.relative_to(package)}" for file in files} <= set(names)
    assert "rlhf_pl/py.typed" in names
    assert not [name for name in names if name.startswith(("callbacks/", "tests/", "examples/"))]
