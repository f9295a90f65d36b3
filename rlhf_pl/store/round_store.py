"""The round store: the rounds of a run directory, everything they produced as Parquet shards under manifests."""

from pathlib import Path

from rlhf_pl.store.files import DamagedStoreError, read_checked, write_checked
from rlhf_pl.store.manifest import ORDER, STAGES
from rlhf_pl.store.round import Round
from rlhf_pl.store.run_identity import HELD_OUT, ROUNDS, STORE, identify, noted_run, numbered, run_of

__all__ = ["ORDER", "STAGES", "DamagedStoreError", "Round", "RoundStore"]


class RoundStore:
    """The rounds of a run directory, and the evaluations on held-out prompts beside them.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)

    @property
    def noted_run(self) -> str | None:
        """Which run the store is of, as its file says; None if that says nothing."""
        return noted_run(self.run_dir)

    @property
    def run(self) -> str | None:
        """Which run the store is of; where no manifest is of the noted one, as most say. None for older versions."""
        return run_of(self.run_dir)

    def identify(self) -> str:
        """Which run the store is of, noted for good."""
        return identify(self.run_dir)

    @property
    def given_up(self) -> list[str]:
        """Names of rounds that are lost, and without which the run goes on."""
        return (read_checked(self.run_dir / STORE) or {}).get("given_up", [])

    def give_up(self, stored: Round) -> None:
        """Note that the run goes on without a round that was lost."""
        given_up = sorted({*self.given_up, stored.name})
        write_checked(self.run_dir / STORE, {"run": self.identify(), "given_up": given_up})

    def round(self, index: int) -> Round:
        """What the policy after `index` rounds generated for training."""
        return Round(self.run_dir / ROUNDS / f"{index:04d}")

    def held_out(self, version: int) -> Round:
        """What the policy after `version` rounds answered to the held-out prompts."""
        return Round(self.run_dir / HELD_OUT / f"{version:04d}")

    def rounds(self) -> dict[int, Round]:
        """The rounds that are there, ascending."""
        return _rounds_in(self.run_dir / ROUNDS)

    def evaluations(self) -> dict[int, Round]:
        """The evaluations that are there, ascending."""
        return _rounds_in(self.run_dir / HELD_OUT)

    def everything(self) -> list[Round]:
        """The rounds and evaluations that are there."""
        return [*self.rounds().values(), *self.evaluations().values()]

    def tidy(self) -> None:
        """What processes that died have left behind; to be called by the owner of the run directory alone."""
        for stored in self.everything():
            stored.tidy()

    def damage(self) -> list[tuple[Round, Path]]:
        """Every damaged or missing file, with its round."""
        return [(stored, file) for stored in self.everything() for file in stored.damage()]


def _rounds_in(folder: Path) -> dict[int, Round]:
    return {number: Round(path) for number, path in numbered(folder).items()}
