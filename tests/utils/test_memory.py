"""Memory that the kernels of bfloat16 products take in a process of the command line."""

import os
import subprocess
import sys

import pytest

from rlhf_pl.utils.devices import cpu_has_bfloat16

VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
SCRIPT = """
import contextlib
import torch
from rlhf_pl.__main__ import main
from rlhf_pl.utils.memory import resident_gib

with contextlib.suppress(SystemExit):
    main(["score", "--no_such_option"])
weight = torch.ones(256, 256, dtype=torch.bfloat16)
before = resident_gib()
for rows in range(20, 1020):
    torch.ones(rows, 256, dtype=torch.bfloat16) @ weight
print(resident_gib() - before)
"""


def measure_growth(**variables: str) -> float:
    """Growth of a process that began with a command, after 1000 products of different shapes, GiB."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="bfloat16 products need no kernels of oneDNN")
def test_kernels_of_many_shapes_are_bounded() -> None:
    assert measure_growth() < 0.4


@pytest.mark.exhaustive
@pytest.mark.slow(minutes=0.2)
@pytest.mark.skipif(not cpu_has_bfloat16(), reason="bfloat16 products need no kernels of oneDNN")
def test_a_user_can_choose_another_bound() -> None:
    assert measure_growth(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024") > 0.5
    assert measure_growth(LRU_CACHE_CAPACITY="32", ONEDNN_PRIMITIVE_CACHE_CAPACITY="32") < 0.1
