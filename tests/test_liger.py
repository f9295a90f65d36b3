"""liger-kernel in a model, run on the CPU by Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf_pl.errors import InputError
from rlhf_pl.policy import PolicySource, load_lm
from tests.conftest import save_llama

EQUAL = """
import sys
import torch
from transformers.models.llama import modeling_llama
from rlhf_pl.policy import PolicyLM, PolicySource, load_lm
from rlhf_pl.rows import Tree, lay_out

rows = lay_out([Tree([3, 17, 9, 5], ([4, 8, 15], [16, 23, 42, 7])), Tree([6, 2, 13], ([12, 5], [11]))])
before = dict(vars(modeling_llama)), modeling_llama.LlamaForCausalLM.forward
results = []
for use in (True, False):
    lm = load_lm(PolicySource(sys.argv[1]), use_liger_kernel=use)
    assert (type(lm.model.norm.forward.__self__).__name__ == "LlamaRMSNorm") and ("Liger" in repr(lm.model.norm)) == use
    assert ("forward" in vars(lm.model.layers[0].self_attn)) == use, "rope"
    logps = PolicyLM(lm)(**rows.inputs())
    (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
    results.append((logps.detach(), {name: p.grad for name, p in lm.named_parameters()}))
assert before == (dict(vars(modeling_llama)), modeling_llama.LlamaForCausalLM.forward)
(ours, of_ours), (plain, of_plain) = results
torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
for name, gradient in of_ours.items():
    torch.testing.assert_close(gradient, of_plain[name], atol=1e-4, rtol=1e-3)
print("equal")
"""
WRONG = """
import sys
import rlhf_pl.liger as liger
from rlhf_pl.errors import InputError
from rlhf_pl.policy import PolicySource, load_lm

bind = liger._bind


def off(lm):
    bind(lm)
    for layer in lm.model.layers:
        layer.input_layernorm.offset = 0.01


liger._bind = off
assert "Liger" not in repr(load_lm(PolicySource(sys.argv[1])).model.norm)
try:
    load_lm(PolicySource(sys.argv[1]), use_liger_kernel=True)
except InputError as error:
    print(error)
"""


def interpret(script: str, model: Path) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="no liger-kernel")
def test_one_model_computes_the_same_and_nothing_else_is_changed(tmp_path: Path) -> None:
    assert "equal" in interpret(EQUAL, save_llama(tmp_path / "llama"))


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="no liger-kernel")
def test_kernels_that_give_something_else_are_not_used(tmp_path: Path) -> None:
    said = interpret(WRONG, save_llama(tmp_path / "llama"))
    assert "`model.use_liger_kernel` is true" in said
    assert "differ from plain layers" in said


def test_it_can_be_left_out_and_not_be_required_without_a_gpu(source: PolicySource) -> None:
    load_lm(source, use_liger_kernel=False)
    with pytest.raises(InputError, match=r"`model\.use_liger_kernel` is true.*there is no GPU"):
        load_lm(source, use_liger_kernel=True)
