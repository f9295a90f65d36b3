"""The package in a notebook, beside another LightningModule: the process stays unchanged."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf_pl import CPUFSDPStrategy
from rlhf_pl.utils.cpu import cpu_fsdp
from rlhf_pl.utils.errors import InputError

SCRIPT = """
import importlib, json, logging, os, pkgutil, signal, sys, tempfile, threading, warnings
import datasets, jsonargparse, lightning as L, torch, transformers
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed.fsdp._flat_param import FlatParamHandle
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGES = ("lightning", "jsonargparse", "torch", "transformers", "peft", "datasets")
LOGGERS = ("", *PACKAGES, "lightning.pytorch", "vllm", "filelock", "huggingface_hub")
model, prompts, folder = sys.argv[1:]


def read_attributes():
    # functions of modules and of their classes
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in PACKAGES or module is None:
            continue
        for key, value in list(vars(module).items()):
            if callable(value):
                found[name, key] = value
            if isinstance(value, type) and value.__module__.partition(".")[0] in PACKAGES:
                for own, part in list(vars(value).items()):
                    if callable(part) or isinstance(part, (property, classmethod, staticmethod)):
                        found[value.__module__, value.__qualname__, own] = part
    return found


def read_state():
    return {
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "sys.path": list(sys.path),
        "sys.meta_path": list(sys.meta_path),
        "temporary folder": tempfile.tempdir,
        "logging levels": {name: logging.getLogger(name).level for name in LOGGERS},
        "handlers": list(logging.root.handlers),
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr),
        "torch": (
            torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
        ),
        "strategies": sorted(StrategyRegistry),
        "loaders": dict(jsonargparse._loaders_dumpers.loaders),
        "a patched class": FlatParamHandle.to_cpu,
    }


def fit(module, **data):
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=2, limit_val_batches=0,
                        logger=False, enable_progress_bar=False, enable_model_summary=False,
                        enable_checkpointing=False, default_root_dir=folder, **data.pop("trainer", {}))
    trainer.fit(module, **data)
    return trainer


tempfile.gettempdir()
fit(BoringModel())  # makes the changes of Lightning itself
before, known = read_state(), read_attributes()

import rlhf_pl
from rlhf_pl import *
assert {name for name in rlhf_pl.__all__ if name not in globals()} == set()
from rlhf_pl.callbacks import HFExport, RoundRefresh, RunReport, SampleTable, DegenerationGuard

for module in pkgutil.walk_packages(rlhf_pl.__path__, "rlhf_pl."):  # also the command line's
    if not any(part in module.name for part in ("vllm_", "weight_sync.receive", "kernels", "by_path", "worker")):
        importlib.import_module(module.name)

after_import = read_state()
rebel = RebelModule(model)
trainer = fit(
    rebel,
    datamodule=RoundDataModule(prompts, val_prompts=2, max_prompt_tokens=64, batch_size=2),
    trainer={"callbacks": [
        RoundRefresh(
            reward=lambda response: float(len(set(response))), sampler=TransformersSampler(),
            sampling=SamplingConfig(num_responses=2, max_response_tokens=4),
        ),
        DegenerationGuard(), HFExport(), SampleTable(), RunReport(),
    ]},
)
assert trainer.global_step >= 1
fit(BoringModel())
after, now = read_state(), read_attributes()
changed = [
    f"{key} by {what}: {value} is {then[key]}"
    for what, then in (("import", after_import), ("fit", after)) for key, value in before.items() if then[key] != value
]
changed += [str(key) for key, value in known.items() if key in now and now[key] is not value]
classes = {key[:-1] for key in known if len(key) == 3}
changed += [str(key) for key in now if len(key) == 3 and key[:-1] in classes and key not in known
            and getattr(now[key], "__module__", "").startswith("rlhf_pl")]
print(json.dumps(changed))
"""


def test_the_process_stays_unchanged(tmp_path: Path, llama: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i} plus {i}?"}) + "\n" for i in range(8)))
    names = ("RLHF_PL_VERBOSE", "TOKENIZERS_PARALLELISM")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(llama), str(prompts), str(tmp_path / "run")],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    changed = json.loads(done.stdout.splitlines()[-1])
    assert not changed, "\n".join(changed)


def test_torchs_fsdp_is_patched_inside_a_block_only() -> None:
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    before = FlatParamHandle.to_cpu
    with cpu_fsdp():
        assert FlatParamHandle.to_cpu is not before
    with contextlib.suppress(ZeroDivisionError), cpu_fsdp():
        raise ZeroDivisionError
    assert FlatParamHandle.to_cpu is before


def test_fsdp_on_a_cpu_names_the_context_manager() -> None:
    strategy = CPUFSDPStrategy(parallel_devices=[torch.device("cpu")])
    strategy.cluster_environment = type("One", (), {"local_rank": lambda self: 0})()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"rlhf_pl\.utils\.cpu\.cpu_fsdp"):
        strategy._setup_model(nn.Linear(1, 1))
