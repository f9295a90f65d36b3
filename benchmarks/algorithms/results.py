"""The results of runs in a file of JSON Lines, and the choice of learning rates."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.algorithms.tasks import Task
from benchmarks.algorithms.training import Curve
from benchmarks.algorithms.variants import ALL
from benchmarks.all_pairs import mean

TUNING = "tuning"  # runs that choose the learning rate
FINAL = "final"  # runs at the chosen rate, with other seeds


@dataclass(frozen=True)
class Run:
    """A run. `curve` is empty where it failed, for example because its weights became infinite."""

    task: str
    algorithm: str
    rate: float
    seed: int
    phase: str
    curve: Curve


class Results:
    """Finished runs, in a file to which each is appended.

    Args:
        file: JSON Lines; runs that it has already are not made again.
        name: The task's name; other tasks may be in the same file.
        task: Its settings. Runs with other settings do not count.
    """

    def __init__(self, file: Path, name: str, task: Task) -> None:
        self.file, self.name, self.task = file, name, task
        self.runs = list(self._read())

    def _read(self) -> Iterator[Run]:
        settings = json.loads(json.dumps(_shared(self.task)))
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            row = json.loads(line)
            if row["task"] == self.name and row.pop("settings") == settings:
                columns = row.pop("curve")
                curve = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                yield Run(curve=curve, **row)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        columns = {name: [float(f"{point[name]:.5g}") for point in run.curve] for name in (run.curve or [{}])[0]}
        row: dict[str, Any] = asdict(run) | {"curve": columns, "settings": _shared(self.task)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def select(self, algorithm: str, phase: str, rate: float | None = None) -> list[Run]:
        """Runs of an algorithm, by seed."""
        found = (r for r in self.runs if r.algorithm == algorithm and r.phase == phase and rate in (None, r.rate))
        return sorted(found, key=lambda run: run.seed)

    def has(self, algorithm: str, phase: str, rate: float, seed: int) -> bool:
        return any(run.seed == seed for run in self.select(algorithm, phase, rate))

    def best_rate(self, algorithm: str) -> float | None:
        """The rate with the highest mean reward over the evaluations of its tuning runs; None without any.

        At the end of a run several rates may have reached the task's maximum.
        """
        tried = {rate: self.tuning_rewards(algorithm, rate) for rate in self.task.rates}
        means = {rate: mean(found) for rate, found in tried.items() if found and None not in found}
        return max(means, key=means.__getitem__, default=None)

    def tuning_rewards(self, algorithm: str, rate: float) -> list[Any]:
        """The mean reward over the evaluations of each tuning run, the start excluded; None where it failed."""
        runs = self.select(algorithm, TUNING, rate)
        return [mean([p["reward"] for p in run.curve[1:]]) if run.curve else None for run in runs]

    def finals(self) -> dict[str, list[Run]]:
        """For each algorithm its final runs at its best rate, without those that failed."""
        found = {name: self.select(name, FINAL, self.best_rate(name) or 0.0) for name in ALL}
        return {name: [run for run in runs if run.curve] for name, runs in found.items() if runs}


def _shared(task: Task) -> dict[str, Any]:
    """The settings that runs must share to be compared: without the rates, of which further ones may be tried."""
    return {name: value for name, value in asdict(task).items() if name != "rates"}
