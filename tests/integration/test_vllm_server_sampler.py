"""Runs that sample responses with `vllm serve`, whose weights the trainer syncs."""

import importlib.util
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pl.distributed.listener import make_token
from rlhf_pl.models.policy import load_lm
from rlhf_pl.models.source import ModelSource
from rlhf_pl.rollout import EngineSpec, PromptTokens, SamplingConfig, VLLMServerSampler
from rlhf_pl.rollout.weight_sync.transports import TCPPush
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.integration.test_fit import PROMPTS
from tests.soak.servers import Member
from tests.unknown_clients import KINDS, is_rejected, visit

pytestmark = [
    pytest.mark.xdist_group("samplers"),  # they share servers and engines, which start slowly
    pytest.mark.slow(minutes=3),
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]


def fit(folder: Path, llama: Path, prompts: str, sampler: dict[str, object], *options: str) -> str:
    """Run `rlhf-pl fit` for two rounds and return its output, after "FAILED" if it failed."""
    command = [sys.executable, "-m", "rlhf_pl", "fit", "--model.policy", str(llama), "--data.prompts", prompts]
    command += ["--data.val_prompts", "4", "--data.batch_size", "2", "--data.max_prompt_tokens", "64"]
    command += ["--rollout.reward", "tests.integration.test_fit.reward", "--rollout.sampler", json.dumps(sampler)]
    command += ["--rollout.sampling.num_responses", "3", "--rollout.sampling.max_response_tokens", "8"]
    command += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(folder)]
    command += ["--trainer.precision", "32-true", "--model.optimizer.lr", "1e-4", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    return done.stdout + done.stderr if done.returncode == 0 else f"FAILED {done.stdout}{done.stderr}"


def read_responses(run: Path) -> list[list[list[int]]]:
    return [RoundStore(run).round(i).read("responses")["response_tokens"].to_pylist() for i in range(2)]


def test_two_rounds_match_those_of_an_engine_in_the_process(
    servers: list[str], llama: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    """With one process, and with two that sync one sharded policy and share the server."""
    prompts = write_jsonl(PROMPTS)
    inside = {"class_path": "VLLMSampler", "init_args": {"dtype": "float32", "kv_cache_gib": 0.05}}
    served = {"class_path": "VLLMServerSampler", "init_args": {"urls": servers[:1], "dtype": "float32"}}
    accumulate = "--trainer.accumulate_grad_batches"
    for name, sampler, options in (
        ("inside", inside, [accumulate, "2"]),
        ("one", served, [accumulate, "2"]),
        ("two", served, [accumulate, "1", "--trainer.devices", "2", "--trainer.strategy", "fsdp2"]),
    ):
        output = fit(tmp_path / name, llama, prompts, sampler, *options)
        assert not output.startswith("FAILED"), output
    weights = {run: load_file(tmp_path / run / "model" / "model.safetensors") for run in ("inside", "one", "two")}
    for run in ("one", "two"):
        assert read_responses(tmp_path / run) == read_responses(tmp_path / "inside")
        for name, tensor in weights["inside"].items():
            torch.testing.assert_close(weights[run][name], tensor, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"urls": ["localhost:1"]}, "must be a list of addresses that begin with http"),
        ({"urls": ["http://127.0.0.1:9"]}, "http://127.0.0.1:9 can't be reached"),
        ({}, "`rollout.sampler.dtype` is bfloat16, but the server"),
        ({"transport": "nccl", "dtype": "float32"}, "needs 'nccl'"),
        ({"dtype": "float32", "address": "127.0.0.9:1"}, "must reach the trainer at"),
    ],
)
def test_unsuitable_servers_are_refused(
    servers: list[str], source: ModelSource, arguments: dict[str, Any], message: str
) -> None:
    def connect() -> None:
        with closing(VLLMServerSampler(**{"urls": servers} | arguments)) as sampler:
            sampler.check()
            sampler.start(EngineSpec(source, max_model_tokens=64, max_sequences=8))

    with pytest.raises(InputError) as refused:
        connect()
    assert message in str(refused.value)


def test_a_run_with_unsuitable_servers_ends_with_a_short_error(
    servers: list[str], llama: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    sampler: dict[str, object] = {"class_path": "VLLMServerSampler", "init_args": {"urls": servers}}
    output = fit(tmp_path / "run", llama, write_jsonl(PROMPTS), sampler)
    assert output.startswith("FAILED")
    assert "`rollout.sampler.dtype` is bfloat16, but the server" in " ".join(output.split()), output
    assert "Traceback" not in output


def test_a_lost_server_is_not_used_until_it_is_back(
    servers: list[str], llama: Path, source: ModelSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server is killed during a request, and restarted with its initial weights: the responses stay the same."""
    prompts = [PromptTokens([5, 6, 7, 8 + i], 100 * i) for i in range(24)]
    sampling = SamplingConfig(num_responses=4, max_response_tokens=40)
    weights = {name: tensor + 0.01 for name, tensor in load_lm(source).state_dict().items()}

    def sample(sampler: VLLMServerSampler) -> list[list[list[int]]]:
        responses = dict(sampler.generate(prompts, sampling))
        return [[r.token_ids for r in responses[i]] for i in range(len(prompts))]

    def sync_weights(sampler: VLLMServerSampler) -> None:
        sampler.invalidate_weights(weights)
        sampler.load_weights(weights.items())

    second = Member(llama, tmp_path, "second")
    urls = [servers[0], second.proxy.url]
    settings: dict[str, Any] = {"dtype": "float32", "concurrency": 2, "retries": 1, "backoff_s": 0.1}
    with closing(second), closing(VLLMServerSampler(urls, **settings)) as sampler:
        sampler.check()
        sampler.start(EngineSpec(source, max_model_tokens=64, max_sequences=96))
        sync_weights(sampler)
        expected = sample(sampler)
        share = second.proxy.completed.total()
        assert share > 0
        killer = threading.Thread(target=lambda: (second.proxy.wait_for_work(), second.kill()))
        killer.start()
        assert sample(sampler) == expected
        killer.join()
        output = " ".join(capsys.readouterr().out.split())
        assert f"{second.proxy.url} samples no responses until it is back" in output
        sync_weights(sampler)  # to the remaining server
        assert sample(sampler) == expected
        second.restart()
        sync_weights(sampler)
        assert f"{second.proxy.url} is back" in " ".join(capsys.readouterr().out.split())
        before = second.proxy.completed.total()
        assert sample(sampler) == expected
        assert second.proxy.completed.total() > before
        assert second.proxy.stale == 0
        second.kill()
        second.restart()  # between two rounds: the sampler has not noticed
        assert sample(sampler) == expected
        assert second.proxy.stale == 0


def test_unreachable_servers_are_refused() -> None:
    sampler = VLLMServerSampler(["http://127.0.0.1:9", "http://127.0.0.1:10"], retries=0)
    with (
        closing(sampler),
        pytest.raises(InputError, match="none of the 2 servers is left"),
    ):
        sampler.check()


def test_a_server_works_after_unknown_clients_and_trainers(servers: list[str], source: ModelSource) -> None:
    """Unknown clients connect to the trainer's port, and a server connects to an unknown trainer before."""
    import httpx

    with socket.create_server(("127.0.0.1", 0)) as listener:
        info = {"address": "127.0.0.1", "port": listener.getsockname()[1], "token": "GET / HTTP/1.1", "timeout_s": 1.0}
        reply = httpx.post(servers[0] + "/init_weight_transfer_engine", json={"init_info": info}, timeout=60)
        assert reply.status_code >= 400  # the server has not connected: the next connection is the first
        info["token"] = make_token()
        reply = httpx.post(servers[0] + "/init_weight_transfer_engine", json={"init_info": info}, timeout=60)
        assert reply.status_code == 200
        connection, _ = listener.accept()
        connection.settimeout(10)
        assert connection.recv(100).decode() == info["token"]
        update = {"names": ["model.norm.weight"], "dtype_names": ["float32"], "shapes": [[64]]}
        for path in ("/pause?mode=wait", "/start_weight_update"):
            assert httpx.post(servers[0] + path, timeout=60).status_code == 200
        start = time.monotonic()
        reply = httpx.post(servers[0] + "/update_weights", json={"update_info": update}, timeout=60)
        assert reply.status_code >= 400
        assert time.monotonic() - start < 10
        assert is_rejected(connection, 5)

    make_info = TCPPush.init_info
    connections = []

    def init_info(push: TCPPush, first_worker: int, workers: int) -> dict[str, Any]:
        info = make_info(push, first_worker, workers)
        connections.extend(visit(kind, info["port"], info["token"], random.Random(0)) for kind in KINDS)
        return info

    with pytest.MonkeyPatch.context() as patch, closing(VLLMServerSampler(servers, dtype="float32")) as sampler:
        patch.setattr(TCPPush, "init_info", init_info)
        sampler.start(EngineSpec(source, max_model_tokens=64, max_sequences=8))
        weights = load_lm(source).state_dict()
        sampler.invalidate_weights(weights)
        sampler.load_weights(weights.items())
        sampled = dict(sampler.generate([PromptTokens([5, 6, 7], 1)], SamplingConfig(max_response_tokens=4)))
    for connection in connections:
        connection.close()
    assert all(response.token_ids for response in sampled[0])
