"""Two processes, of which only the first can read the weights."""

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
from safetensors.torch import save_file
from rlhf_pl import FSDP2Strategy, LoRA, RebelModule
from rlhf_pl.models.packed_batch import PrefixGroup, pack

strategy, out = sys.argv[1:]
rank = int(os.environ["RANK"])


class Module(RebelModule):
    def training_step(self, batch, index):
        rows = pack([PrefixGroup([5, 6, 7], ([9, 10], [11 + rank]))])
        return self(**rows.inputs()).sum() * 1e-2

    def on_fit_start(self):
        self.export_to = {name: tensor.clone() for name, tensor in self.weights().stream()}


for kind in ("tied", "untied"):
    folder = f"{out}/{kind}" + ("-without-weights" if rank else "")  # with a config and a tokenizer, and no weights
    for lora in (None, LoRA(rank=2)):
        chosen = FSDP2Strategy() if strategy == "fsdp2" else strategy
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy=chosen, max_steps=2, logger=False,
                            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        module = Module(folder, lora=lora, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        trainer.fit(module, torch.utils.data.DataLoader(range(8)))
        trained = {name: tensor.clone() for name, tensor in module.weights().stream()}
        for when, tensors in (("start", module.export_to), ("end", trained)):
            name = f"{out}/{kind}-{'lora' if lora else 'full'}-{when}-{rank}.safetensors"
            save_file({n: t.contiguous().clone() for n, t in tensors.items()}, name)
"""


@pytest.mark.slow(minutes=0.5)
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.exhaustive), "fsdp2"])
def test_only_the_first_rank_reads_weights(tmp_path: Path, strategy: str) -> None:
    """Models with and without tied embeddings, with full training and with adapters."""
    for kind in ("tied", "untied"):
        save_llama(tmp_path / kind, tie_word_embeddings=kind == "tied")
        bare = save_llama(tmp_path / f"{kind}-without-weights", tie_word_embeddings=kind == "tied")
        (bare / "model.safetensors").unlink()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x"}
    shared |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, strategy, str(tmp_path)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [p.wait(timeout=200) for p in processes] == [0, 0]
    for kind in ("tied", "untied"):
        given = load_lm(ModelSource(str(tmp_path / kind))).state_dict()
        for trained in ("full", "lora"):
            start, end = (
                [load_file(tmp_path / f"{kind}-{trained}-{when}-{rank}.safetensors") for rank in range(2)]
                for when in ("start", "end")
            )
            for name, tensor in given.items():
                assert start[0][name].equal(tensor)
            for both in (start, end):
                assert all(both[0][name].equal(both[1][name]) for name in both[0])
            assert any(not end[0][name].equal(start[0][name]) for name in end[0])
