"""Two processes of which only the first can read the weights."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_pl.models.policy import load_lm
from rlhf_pl.models.source import ModelSource
from tests.conftest import save_llama

SCRIPT = """
import os, sys, torch, lightning as L
import rlhf_pl.distributed.strategies
from rlhf_pl import LoRA, RebelModule
from rlhf_pl.models.packed_batch import PrefixGroup, pack

strategy, folder, out, lora = sys.argv[1:]
rank = int(os.environ["RANK"])
if rank:  # its folder has a config and a tokenizer, and no weights
    folder += "-without-weights"


class Module(RebelModule):
    def training_step(self, batch, index):
        rows = pack([PrefixGroup([5, 6, 7], ([9, 10], [11 + rank]))])
        return self(**rows.inputs()).sum() * 1e-2

    def on_fit_start(self):
        self.export_to = {name: tensor.clone() for name, tensor in self.weights().stream()}


trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=2, logger=False,
                    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
module = Module(folder, lora=LoRA(rank=2) if lora == "lora" else None, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
trainer.fit(module, torch.utils.data.DataLoader(range(8)))
trained = {name: tensor.clone() for name, tensor in module.weights().stream()}
from safetensors.torch import save_file
save_file({n: t.contiguous().clone() for n, t in module.export_to.items()}, f"{out}/start-{rank}.safetensors")
save_file({n: t.contiguous().clone() for n, t in trained.items()}, f"{out}/end-{rank}.safetensors")
"""


@pytest.mark.slow(1)
@pytest.mark.parametrize("lora", ["full", "lora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_first_rank_alone_reads_weights(tmp_path: Path, strategy: str, lora: str, tied: bool) -> None:
    folder = save_llama(tmp_path / "llama", tie_word_embeddings=tied)
    bare = save_llama(tmp_path / "llama-without-weights", tie_word_embeddings=tied)
    (bare / "model.safetensors").unlink()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, strategy, str(folder), str(tmp_path), lora]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [p.wait(timeout=200) for p in processes] == [0, 0]
    start, end = (
        [load_file(tmp_path / f"{when}-{rank}.safetensors") for rank in range(2)] for when in ("start", "end")
    )
    for name, tensor in load_lm(ModelSource(str(folder))).state_dict().items():
        assert start[0][name].equal(tensor)
    for both in (start, end):
        assert all(both[0][name].equal(both[1][name]) for name in both[0])
    assert any(not end[0][name].equal(start[0][name]) for name in end[0])
