"""liger-kernel's output head, run on the CPU by Triton's interpreter, against plain torch."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import save_llama

pytestmark = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="no liger-kernel")
START = """
import sys
import torch
import rlhf_pl.fused_head as fused_head
import rlhf_pl.policy as policy_module
from rlhf_pl.policy import PolicyLM, PolicySource, load_lm
from rlhf_pl.rows import Tree, lay_out

rows = lay_out([Tree([3, 17, 9, 5], ([4, 8, 15], [16, 23, 42, 7])), Tree([6, 2, 13], ([12, 5], [11]))])
lm = load_lm(PolicySource(sys.argv[1]))
policy = PolicyLM(lm)


def run(temperature):
    lm.zero_grad()
    logps = policy(**rows.inputs(), temperature=temperature)
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}

"""
EQUAL = """
results = []
plain = policy_module.linear_logps
for use in (True, False):
    if use:
        policy_module.linear_logps = None  # not called
    else:
        policy_module.linear_logps = plain
        policy_module.fused_logps = lambda *_: None
    results += [run(1.0), run(0.7)]
    lm.get_output_embeddings().weight.requires_grad_(False)
    results += [run(0.7)]
    lm.get_output_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        results += [(policy(**rows.inputs()), {})]
for (logps, gradients), (expected, plain_gradients) in zip(results[:4], results[4:], strict=True):
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-4, rtol=1e-4)
print("equal")
"""
WRONG = """
plain = fused_head._by_liger
fused_head._by_liger = lambda *inputs: 1.001 * plain(*inputs)
calls = []
linear = policy_module.linear_logps
policy_module.linear_logps = lambda *inputs: calls.append(1) or linear(*inputs)
run(1.0)
run(1.0)
assert len(calls) == 2
"""


def interpret(script: str, model: Path) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", START + script, str(model)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("tied", [True, False])
def test_log_probs_and_gradients_are_the_plain_ones(tmp_path: Path, tied: bool) -> None:
    assert "equal" in interpret(EQUAL, save_llama(tmp_path / "llama", tie_word_embeddings=tied))


def test_a_kernel_that_gives_something_else_is_not_used_and_that_is_said_once(tmp_path: Path) -> None:
    said = interpret(WRONG, save_llama(tmp_path / "llama"))
    assert said.count("log-probs are computed without it") == 1
