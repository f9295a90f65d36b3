"""Runs whose answers come from a `vllm serve` elsewhere, its weights pushed by the trainer."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pl.rounds import RoundStore
from tests.integration.test_fit import PROMPTS
from tests.vllm_serving import sampling_server, serving

pytestmark = [
    pytest.mark.xdist_group("server"),  # they share what takes long to start
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]


@pytest.fixture(scope="module")
def server(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sampling_server(llama, tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def fit(folder: Path, llama: Path, prompts: str, sampler: dict[str, object], *options: str) -> str:
    """`rlhf-pl fit` for two rounds; gives what it printed."""
    command = [sys.executable, "-m", "rlhf_pl", "fit", "--model.policy", str(llama), "--data.prompts", prompts]
    command += ["--data.val_prompts", "4", "--data.batch_size", "2", "--data.max_prompt_tokens", "64"]
    command += ["--rollout.reward", "tests.integration.test_fit.reward", "--rollout.sampler", json.dumps(sampler)]
    command += ["--rollout.sampling.num_responses", "3", "--rollout.sampling.max_response_tokens", "8"]
    command += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)]
    command += ["--model.optimizer.lr", "1e-4", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    return done.stdout + done.stderr if done.returncode == 0 else f"FAILED {done.stdout}{done.stderr}"


def answers(run: Path) -> list[list[list[int]]]:
    return [RoundStore(run).round(i).read("responses")["response_tokens"].to_pylist() for i in range(2)]


def test_two_rounds_are_those_of_an_engine_in_the_process(
    server: str, llama: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    """By one process, and by two that push one sharded policy and share the server."""
    prompts = write_jsonl(PROMPTS)
    inside = {"class_path": "VLLMSampler", "init_args": {"dtype": "float32", "kv_cache_gib": 0.05}}
    elsewhere = {"class_path": "VLLMServerSampler", "init_args": {"urls": [server], "dtype": "float32"}}
    accumulate = "--trainer.accumulate_grad_batches"
    for name, sampler, options in (
        ("inside", inside, [accumulate, "2"]),
        ("one", elsewhere, [accumulate, "2"]),
        ("two", elsewhere, [accumulate, "1", "--trainer.devices", "2", "--trainer.strategy", "fsdp2"]),
    ):
        said = fit(tmp_path / name, llama, prompts, sampler, *options)
        assert not said.startswith("FAILED"), said
    weights = {run: load_file(tmp_path / run / "model" / "model.safetensors") for run in ("inside", "one", "two")}
    for run in ("one", "two"):
        assert answers(tmp_path / run) == answers(tmp_path / "inside")
        for name, tensor in weights["inside"].items():
            torch.testing.assert_close(weights[run][name], tensor, rtol=0, atol=5e-5)


def test_servers_that_do_not_fit_are_refused(
    server: str, llama: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    prompts = write_jsonl(PROMPTS)
    with serving(llama, tmp_path / "plain.log", room=128) as plain:
        for arguments, message in (
            ({"urls": ["localhost:1"]}, "must be a list of addresses that begin with http"),
            ({"urls": ["http://127.0.0.1:9"]}, "http://127.0.0.1:9 can't be reached"),
            ({"urls": [server]}, "`rollout.sampler.dtype` is bfloat16, but the server"),
            ({"urls": [server], "transport": "nccl", "dtype": "float32"}, "needs 'nccl'"),
            ({"urls": [server, plain], "dtype": "float32"}, "does not take weights"),
            ({"urls": [server], "dtype": "float32", "address": "127.0.0.9:1"}, "must reach the trainer at"),
        ):
            run = tmp_path / "run"
            said = fit(run, llama, prompts, {"class_path": "VLLMServerSampler", "init_args": arguments})
            assert said.startswith("FAILED"), arguments
            assert message in " ".join(said.split()), said
            assert "Traceback" not in said
