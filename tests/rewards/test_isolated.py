"""Functions in separate processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_pl.rewards import (
    CombinedReward,
    Failure,
    FunctionReward,
    NumericAnswer,
    RewardResult,
    Sample,
    ScoringConfig,
    WeightedReward,
)
from rlhf_pl.rewards.combine import isolate_functions
from rlhf_pl.rewards.guard import score_samples
from rlhf_pl.utils.errors import InputError

HOSTILE = """
import ctypes, os, sys, time
from datetime import date
from rlhf_pl import RewardResult
import sibling

def score(response, day):
    if response == "locked": sum(range(10**13))
    if response == "swallows":
        while True:
            try: time.sleep(1)
            except BaseException: pass
    if response == "exits": os._exit(0)
    if response == "crashes": ctypes.string_at(0)
    if response == "leaves": sys.exit(0)
    if response == "none": return None
    print("stdout is not the connection to the parent")
    return RewardResult(sibling.FACTOR * len(response), {"day": day.day, "pid": os.getpid()})

def forever(responses):
    os.system("sleep 600 &")
    open("started", "w").write(str(os.getpid()))
    while True:
        try: time.sleep(600)
        except BaseException: pass
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "sibling.py").write_text("FACTOR = 2\n")
    (folder / "hostile.py").write_text(HOSTILE)
    return folder / "hostile.py"


@pytest.fixture
def reward(file: Path) -> Iterator[FunctionReward]:
    reward = FunctionReward(f"{file}:score")
    reward.isolate()
    yield reward
    reward.close()


def sample(response: str) -> Sample:
    from datetime import date

    return Sample("p", [{"role": "user", "content": "?"}], response, columns={"day": date(2020, 1, 7)})


def test_a_misbehaving_function_only_loses_that_response(reward: FunctionReward, file: Path) -> None:
    plain = FunctionReward(f"{file}:score")
    assert reward.fingerprint() == plain.fingerprint()
    assert reward.name == plain.name
    samples = [sample(r) for r in ("ab", "leaves", "none", "swallows", "abc")]
    config = ScoringConfig(1.0, retries=0, on_failure="drop")
    found = score_samples(reward, samples, config)
    assert [isinstance(o, Failure) and o.kind for o in found] == [False, "exception", "refused", "timeout", False]
    assert [o.reward for o in found if isinstance(o, RewardResult)] == [4.0, 6.0]
    first, last = found[0], found[-1]
    assert isinstance(first, RewardResult)
    assert isinstance(last, RewardResult)
    assert first.components["day"] == 7
    pids = [first.components["pid"], last.components["pid"], os.getpid()]
    assert len(set(pids)) == 3  # restarted after it was killed
    details = [o.detail for o in found if isinstance(o, Failure)]
    for detail, text in zip(details, ["raised SystemExit(0)", "returned None", "within 1 s"], strict=True):
        assert text in detail
    assert reward._abandoned_calls == 0  # the process was killed, so no call was abandoned


@pytest.mark.slow(minutes=0.5)
def test_a_process_that_exits_or_hangs_in_c_only_loses_that_response(reward: FunctionReward) -> None:
    with pytest.raises(InputError, match=r"score` failed.*process exited with status 0 without a result"):
        score_samples(reward, [sample("exits")], ScoringConfig(5, retries=0))
    config = ScoringConfig(1.0, retries=0, on_failure="drop")
    found = score_samples(reward, [sample(r) for r in ("locked", "crashes", "abc")], config)
    assert [isinstance(o, Failure) and o.kind for o in found] == ["timeout", "exception", False]
    assert "was killed by SIGSEGV without a result" in found[1].detail  # type: ignore[union-attr]


RUN = """
import sys
from rlhf_pl.rewards import FunctionReward, Sample, ScoringConfig
from rlhf_pl.rewards.guard import score_samples
reward = FunctionReward(sys.argv[1] + ":forever")
reward.isolate()
score_samples(reward, [Sample("p", [{"role": "user", "content": "?"}], "a")], ScoringConfig())
"""


def has_exited(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_process_exits_with_its_parent(file: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", RUN, str(file)], cwd=tmp_path)
    until = time.monotonic() + 60
    while not ((tmp_path / "started").exists() and (tmp_path / "started").read_text()):
        assert time.monotonic() < until
        time.sleep(0.1)
    pid = int((tmp_path / "started").read_text())
    assert not has_exited(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 10
    while not has_exited(pid):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_only_functions_given_by_import_path_can_be_isolated(file: Path) -> None:
    with pytest.raises(InputError, match=r"isolate.*NumericAnswer is not one"):
        isolate_functions(NumericAnswer())
    with pytest.raises(InputError, match=r"isolate.*is a function object"):
        isolate_functions(FunctionReward(lambda response: 1.0))
    both = CombinedReward([WeightedReward(NumericAnswer()), WeightedReward(f"{file}:score", name="own")])
    isolate_functions(both)
    assert both.parts[1]._isolated is not None  # type: ignore[attr-defined]


def test_a_function_that_the_process_cannot_import_is_named(file: Path) -> None:
    reward = FunctionReward(f"{file}:score")
    reward.isolate()
    file.with_name("sibling.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(InputError, match=r"can't be opened: `rollout.scoring.isolate`: .*score.*SystemExit"):
        score_samples(reward, [sample("ab")], ScoringConfig())
