"""The round store of a run directory: the data of all rounds, as Parquet shards and manifests."""

from pathlib import Path

from rlhf_pl.store.files import DamagedStoreError, read_checked, write_checked
from rlhf_pl.store.manifest import GIVEN, ORDER, STAGES
from rlhf_pl.store.round import Round
from rlhf_pl.store.run_identity import HELD_OUT, ROUNDS, STORE, find_round_folders, find_run, identify, recorded_run

__all__ = ["GIVEN", "ORDER", "STAGES", "DamagedStoreError", "Round", "RoundStore"]


class RoundStore:
    """The rounds of a run directory, and the evaluations on held-out prompts.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)

    @property
    def recorded_run(self) -> str | None:
        """Id of the run that the file of the store records; None if there is none."""
        return recorded_run(self.run_dir)

    @property
    def run(self) -> str | None:
        """Id of the run that the store belongs to: see `find_run`."""
        return find_run(self.run_dir)

    def identify(self) -> str:
        """Id of the run that the store belongs to; records it in the file of the store."""
        return identify(self.run_dir)

    @property
    def given_up(self) -> list[str]:
        """Names of lost rounds without which the run continues."""
        return (read_checked(self.run_dir / STORE) or {}).get("given_up", [])

    def give_up(self, stored: Round) -> None:
        """Record that the run continues without a lost round."""
        given_up = sorted({*self.given_up, stored.name})
        write_checked(self.run_dir / STORE, {"run": self.identify(), "given_up": given_up})

    def round(self, index: int) -> Round:
        """The round that the policy after `index` rounds samples for training."""
        return Round(self.run_dir / ROUNDS / f"{index:04d}")

    def held_out(self, version: int) -> Round:
        """The evaluation of the policy after `version` rounds on the held-out prompts."""
        return Round(self.run_dir / HELD_OUT / f"{version:04d}")

    def rounds(self) -> dict[int, Round]:
        """The existing rounds by index, ascending."""
        return _rounds_in(self.run_dir / ROUNDS)

    def evaluations(self) -> dict[int, Round]:
        """The existing evaluations by policy version, ascending."""
        return _rounds_in(self.run_dir / HELD_OUT)

    def all_rounds(self) -> list[Round]:
        """All existing rounds and evaluations."""
        return [*self.rounds().values(), *self.evaluations().values()]

    def clean_up(self) -> None:
        """Remove temporary files of interrupted processes; only the owner of the run directory may call it."""
        for stored in self.all_rounds():
            stored.clean_up()

    def find_damage(self) -> list[tuple[Round, Path]]:
        """All damaged or missing files, each with its round."""
        return [(stored, file) for stored in self.all_rounds() for file in stored.find_damage()]


def _rounds_in(folder: Path) -> dict[int, Round]:
    return {number: Round(path) for number, path in find_round_folders(folder).items()}
