"""Communication between ranks, and their errors about each other."""

import json
import os
import socket
import subprocess
import sys

import pytest

from rlhf_pl.distributed.ranks import Ranks
from rlhf_pl.utils.errors import InputError

SCRIPT = """
import json, os, sys, time
import torch, torch.distributed as dist
from rlhf_pl.utils.errors import InputError
from rlhf_pl.distributed.ranks import Ranks, RanksError

rank, size, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", rank=rank, world_size=size)
ranks = Ranks(rank, size, timeout=0.05 if what == "late" else 1.0)
if what == "share":
    try:
        ranks.run_on_rank_zero(lambda: (_ for _ in ()).throw(InputError("rank 0 refuses")))
    except InputError as error:
        refused = str(error)
    total = ranks.all_reduce_sum(torch.tensor([1.0 + rank], dtype=torch.float64)).item()
    only = ranks.run_on_rank_zero(lambda: rank)
    print(json.dumps([ranks.broadcast(rank), ranks.all_gather(rank), total, only, refused]))
    ranks.close()
elif what == "late":
    if rank == 1:
        with ranks.phase("scoring responses"):
            time.sleep(8)
    else:
        try:
            with ranks.phase("waiting"):
                ranks.barrier()
        except RanksError as error:
            print(error, flush=True)
            ranks.fail(str(error))
elif what == "fails":
    if rank == size - 1:
        ranks.fail("its disk is full", 7)
        sys.exit(7)
    time.sleep(40)
elif what == "dies":
    if rank == int(sys.argv[4]):
        with ranks.phase("scoring responses"):
            time.sleep(1)
            os.kill(os.getpid(), 9)
    try:
        if rank == 2:
            dist.barrier()  # fails because of the death, before it is reported
    except RuntimeError:
        ranks.fail("its collective failed", 3)
        sys.exit(3)
    time.sleep(40)
"""


def launch(what: str, size: int, *more: str) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(size), what, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    texts = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def test_ranks_exchange_values() -> None:
    for code, output, errors in launch("share", 3):
        assert code == 0, errors
        assert json.loads(output) == [0, [0, 1, 2], 6.0, 0, "rank 0 refuses"]


def test_a_late_rank_is_named_with_its_phase() -> None:
    (_, output, errors), _ = launch("late", 2)
    assert "Rank 0 waited 0.05 minutes for the others in the phase 'waiting'" in output, errors
    assert "rank 1 is at 'scoring responses'" in output
    assert "rollout.timeout_minutes" in output


def test_a_rank_that_fails_ends_the_others_with_its_reason() -> None:
    outcomes = launch("fails", 3)
    assert [code for code, _, _ in outcomes] == [7, 7, 7]
    assert "error: rank 2: its disk is full" in outcomes[0][2]
    assert "disk is full" not in outcomes[1][2]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_ends_the_others(dead: int) -> None:
    outcomes = launch("dies", 3, str(dead))
    assert [code for code, _, _ in outcomes] == [-9 if rank == dead else 1 for rank in range(3)]
    messages = [errors for _, _, errors in outcomes if "has died" in errors]
    assert len(messages) == 1
    assert f"rank {dead}" in messages[0]
    assert dead == 0 or "in the phase 'scoring responses'" in messages[0]
    assert not any("its collective failed" in errors for _, _, errors in outcomes)


def test_one_process_does_not_communicate() -> None:
    ranks = Ranks()
    ranks.barrier()
    assert (ranks.broadcast(3), ranks.all_gather(3), ranks.run_on_rank_zero(lambda: 4), ranks.is_first) == (
        3,
        [3],
        4,
        True,
    )
    with pytest.raises(InputError, match="no"):
        ranks.run_on_rank_zero(lambda: (_ for _ in ()).throw(InputError("no")))
