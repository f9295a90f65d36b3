"""A round's manifest: settings, counts, times, and which stages are complete; with a copy beside it."""

import json
import os
from pathlib import Path
from typing import Any

from rlhf_pl.store.files import SHARD, DamagedStoreError, entries, read_checked, write_checked
from rlhf_pl.store.run_identity import identify, is_own, name_of, noted_run
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.public_names import with_public_descriptions
from rlhf_pl.utils.secrets import redacted

SCHEMA_VERSION = 2
COPY = ".manifest.copy.json"
STAGES = ("responses", "rewards", "pairs", "logps")
ORDER = (*STAGES, "training")  # what a later one is made of comes first


class Manifest:
    """The manifest in a round's folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run_dir = path, path.parent.parent

    def read(self) -> dict[str, Any]:
        """Its content; empty stages if nothing is there yet.

        Raises:
            DamagedStoreError: The file is damaged, or another run's or round's.
        """
        file = self.path / "manifest.json"
        if not os.path.lexists(file):
            return {"schema_version": SCHEMA_VERSION, "stages": {}}
        content = read_checked(file)
        if content is None:
            raise DamagedStoreError(
                f"{file} is damaged: its checksum does not match. The same command with --repair makes it again."
            )
        if content["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"{file} has schema version {content['schema_version']}, and this version of rlhf_pl reads "
                f"{SCHEMA_VERSION}. Give this run a directory of its own (--trainer.default_root_dir DIR)."
            )
        for name in ("settings", "accepted"):  # as they are stored now, in manifests of earlier versions too
            if name in content:
                content[name] = with_public_descriptions(redacted(content[name]))
        if not is_own(self.path, content, noted_run(self.run_dir)):
            raise DamagedStoreError(
                f"{file} belongs to {content.get('round')} of another run or folder. The same command with --repair "
                "moves it aside."
            )
        return content

    def read_copy(self) -> dict[str, Any] | None:
        """The copy, if it is whole and this round's."""
        copy = read_checked(self.path / COPY)
        return copy if copy is not None and is_own(self.path, copy, noted_run(self.run_dir)) else None

    def write(self, content: dict[str, Any]) -> None:
        """Replace the manifest and its copy."""
        content = as_stored(content)
        if "run" not in content:  # a new one, or an older version's: what is there by then is its own
            for stage, info in content["stages"].items():
                if stage in STAGES and not info.get("complete"):
                    info["kept"] = shards_by_name(self.path / stage)
            missing = [stage for stage in STAGES if stage not in content["stages"]]
            begun = {stage: {"complete": False, "kept": shards_by_name(self.path / stage)} for stage in missing}
            content["stages"] |= {stage: info for stage, info in begun.items() if info["kept"]}
            content |= {"run": identify(self.run_dir), "round": name_of(self.path)}
        # The copy first: what is killed before the manifest is written is done again, and clears up behind itself.
        for name in (COPY, "manifest.json"):
            write_checked(self.path / name, content)


def as_stored(content: Any) -> Any:
    """What `content` is once it went through a manifest's JSON, which has no secrets."""
    return redacted(json.loads(json.dumps(content, default=str)))


def shards_by_name(folder: Path) -> list[str]:
    """What is there under the name of a shard; of two with one number neither."""
    names = [path.name for path in entries(folder) if SHARD.fullmatch(path.name)]
    numbers = [shard_number(name) for name in names]
    return [name for name in names if numbers.count(shard_number(name)) == 1]


def shard_number(name: str) -> int:
    """The number in a shard's name."""
    return int(name.split("-")[0])
