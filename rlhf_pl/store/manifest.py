"""The manifest of a round, with its settings, counts, times and complete stages, and the copy of the manifest."""

import json
import os
from pathlib import Path
from typing import Any

from rlhf_pl.store.files import SHARD, DamagedStoreError, list_entries, read_checked, write_checked
from rlhf_pl.store.run_identity import identify, is_own, recorded_run, round_name
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.public_names import with_public_descriptions
from rlhf_pl.utils.secrets import redacted

SCHEMA_VERSION = 2
COPY = ".manifest.copy.json"
GIVEN = "given_logps"  # only in rounds of another run: log-probs under the policy that sampled them
STAGES = ("responses", GIVEN, "rewards", "pairs", "logps")
ORDER = (*STAGES, "training")  # each stage depends on those before it


class Manifest:
    """The manifest in a round's folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.run_dir = path, path.parent.parent

    def read(self) -> dict[str, Any]:
        """Read the manifest; without a file, it has no stages.

        Raises:
            DamagedStoreError: The file is damaged, or of another run or round.
        """
        file = self.path / "manifest.json"
        if not os.path.lexists(file):
            return {"schema_version": SCHEMA_VERSION, "stages": {}}
        content = read_checked(file)
        if content is None:
            raise DamagedStoreError(
                f"{file} is damaged: its checksum does not match. Run the same command with --repair to make it again."
            )
        if content["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"{file} has schema version {content['schema_version']}, but this version of rlhf_pl reads "
                f"{SCHEMA_VERSION}. Use another run directory (--trainer.default_root_dir DIR)."
            )
        for name in ("settings", "accepted"):  # convert those of earlier versions
            if name in content:
                content[name] = with_public_descriptions(redacted(content[name]))
        if not is_own(self.path, content, recorded_run(self.run_dir)):
            raise DamagedStoreError(
                f"{file} belongs to {content.get('round')} of another run or folder. Run the same command with "
                "--repair to move it aside."
            )
        return content

    def read_copy(self) -> dict[str, Any] | None:
        """Read the copy of the manifest; None if it is damaged or of another round."""
        copy = read_checked(self.path / COPY)
        return copy if copy is not None and is_own(self.path, copy, recorded_run(self.run_dir)) else None

    def write(self, content: dict[str, Any]) -> None:
        """Replace the manifest and its copy."""
        content = as_stored(content)
        if "run" not in content:  # a new manifest, or that of an older version: all existing shards are its own
            for stage, info in content["stages"].items():
                if stage in STAGES and not info.get("complete"):
                    info["kept"] = find_shard_names(self.path / stage)
            missing = [stage for stage in STAGES if stage not in content["stages"]]
            started = {stage: {"complete": False, "kept": find_shard_names(self.path / stage)} for stage in missing}
            content["stages"] |= {stage: info for stage, info in started.items() if info["kept"]}
            content |= {"run": identify(self.run_dir), "round": round_name(self.path)}
        # The copy is written first: a process that is killed before the manifest is written repeats its work.
        for name in (COPY, "manifest.json"):
            write_checked(self.path / name, content)


def as_stored(content: Any) -> Any:
    """Convert an object to the form in which a manifest stores it: JSON without secrets."""
    return redacted(json.loads(json.dumps(content, default=str)))


def find_shard_names(folder: Path) -> list[str]:
    """Names of the shards in a folder, without those whose number occurs twice."""
    names = [path.name for path in list_entries(folder) if SHARD.fullmatch(path.name)]
    numbers = [parse_shard_number(name) for name in names]
    return [name for name in names if numbers.count(parse_shard_number(name)) == 1]


def parse_shard_number(name: str) -> int:
    """The number in a shard's name."""
    return int(name.split("-")[0])
