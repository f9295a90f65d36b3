"""A run with secrets of all kinds and a server that echoes them: no file and no output contains one."""

import base64
import json
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from rlhf_pl.__main__ import main
from rlhf_pl.rollout import VLLMServerSampler
from rlhf_pl.utils import secrets
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.fingerprints import describe

PASSWORD, QUERY, LITERAL, HEADER, TOKEN, PROXY, KEY = SECRETS = (
    *("hunter2!pass/word", "querytok-5551x", "sk-literal-0123456789ab", "headertok-998877", "hubtok-77aa88bb99cc"),
    *("proxy-pass-5x", "env-key-4f5e6d7c"),
)
CLASSES = '''
import logging
import warnings

from rlhf_pl.modules import RebelModule
from rlhf_pl.rewards import HTTPReward


class Reward(HTTPReward):
    """Sends more than one kind of secret, and prints them."""

    def __init__(self, url: str, api_key: str, headers: dict[str, str], api_key_env: str):
        super().__init__(url, samples_per_request=1, concurrency=1, retries=0, backoff_s=0.0, api_key_env=api_key_env)
        self.api_key, self.headers = api_key, headers

    def score(self, batch):
        print("scoring with", self.api_key)
        warnings.warn(f"sends {self.headers}")
        logging.getLogger("mine").warning("sends %s", self.api_key)
        if len(batch) == 1 and not batch[0].columns:
            raise ConnectionError(f"{self.url}: {self.headers}")
        return super().score(batch)


class Module(RebelModule):
    """Saves its token as a hyper-parameter, in loggers and checkpoints."""

    def __init__(self, policy: str, hub_token: str) -> None:
        super().__init__(policy)
        self.save_hyperparameters()
        assert self.hparams.hub_token == "hubtok-77aa88bb99cc"
'''


class Echo(BaseHTTPRequestHandler):
    """Echoes requests in the ways of real servers."""

    number = 0

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        sent = [self.headers["authorization"] or "", self.path, *SECRETS]
        count = len(request["samples"])
        echo = " ".join(sent)
        encoded = [echo, json.dumps(json.dumps(echo)), quote(echo, safe=""), *map(_base64, sent), echo.encode().hex()]
        replies = [
            (500, "x" * 175 + echo),  # gets truncated in the middle of a secret
            *((401, text) for text in encoded),
            (200, echo),
            (200, json.dumps({"rewards": [echo] * count})),
            (200, json.dumps({"rewards": [{"reward": 1.0, "components": {echo: 1.0}}] * count})),
            (200, json.dumps({"rewards": [{"reward": 2.5, "components": {"plain": 1.0}}] * count})),
        ]
        status, text = replies[Echo.number % len(replies)]
        Echo.number += 1
        self.send_response(status)
        self.send_header("content-length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        echo = f"{'x' * 270}{self.headers['authorization']} {self.path}".encode()
        self.send_response(403)
        self.send_header("content-length", str(len(echo)))
        self.end_headers()
        self.wfile.write(echo)

    def log_message(self, *_: object) -> None:
        pass


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{server.server_port}/score?token={QUERY}"
    server.shutdown()
    server.server_close()


def find_leaks(text: str) -> list[str]:
    """Find secrets, and halves of them, in a text."""
    forms = {
        secret: [secret, quote(secret, safe=""), secret.encode().hex(), _base64(secret)[:-4]] for secret in SECRETS
    }
    return [
        secret for secret, ways in forms.items() if any(way in text or way[: len(way) // 2] in text for way in ways)
    ]


def read_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Read all files of a run, with Parquet and compressed records decoded."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        yield str(file), content.decode("latin-1")
        if file.suffix == ".parquet":
            yield str(file), json.dumps(pq.read_table(file).to_pylist(), default=str)
        for start in re.finditer(b"\x78[\x01\x9c\xda]", content[:100_000]):
            try:
                yield str(file), zlib.decompressobj().decompress(content[start.start() :]).decode("latin-1")
            except zlib.error:
                continue


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: Path, url: str) -> dict:
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setenv("JUDGE_ACCESS", KEY)  # not a secret by its name, but by `api_key_env`
    monkeypatch.setenv("ALL_PROXY_OF_MINE", f"http://me:{PROXY}@proxy:3128")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "echoed.py").write_text(CLASSES)
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?", "n": i} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reward = {"url": url, "api_key": LITERAL, "headers": {"Authorization": f"Bearer {HEADER}"}}
    loggers = [("TensorBoardLogger", "tb"), ("CSVLogger", "csv")]
    return {
        "model": {"class_path": "echoed.Module", "init_args": {"policy": str(llama), "hub_token": TOKEN}},
        "data": {"prompts": "p.jsonl", "val_prompts": 2, "max_prompt_tokens": 64},
        "rollout": {
            "reward": {"class_path": "echoed.Reward", "init_args": reward | {"api_key_env": "JUDGE_ACCESS"}},
            "scoring": {"on_failure": 0.25, "retries": 0},
            "sampler": "TransformersSampler",
            "sampling": {"num_responses": 4, "max_response_tokens": 4},
        },
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "default_root_dir": "run",
            "logger": [
                {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": {"save_dir": "run", "name": name}}
                for kind, name in loggers
            ],
        },
    }


def test_no_secret_is_in_a_file_or_an_output_of_a_run(
    config: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "c.yaml"]) == 0
    printed = capfd.readouterr()
    assert "scoring with <secret>" in printed.out
    assert find_leaks(printed.out + printed.err) == []
    found = {name: find_leaks(text) for name, text in read_texts(tmp_path / "run")}
    assert {name: secret for name, secret in found.items() if secret} == {}
    assert len(found) > 10
    failures = [t for f in Path("run").rglob("rewards/*.parquet") for t in pq.read_table(f)["failure"].to_pylist() if t]
    assert any("status 401: " in text for text in failures)
    assert any("<secret>" in text for text in failures)
    parameters = torch.load("run/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    assert parameters["hub_token"] == "<secret>"

    # the same command resumes and repeats nothing
    assert main(["fit", "--config", "c.yaml"]) == 0
    again = capfd.readouterr().out
    assert "Resuming from" in again
    assert "again" not in again
    # the run's config needs the secrets that it leaves out, and then resumes as well
    assert main(["fit", "--config", "run/config.yaml"]) == 1
    refused = capfd.readouterr().err
    for option in ("model.init_args.hub_token", "reward.init_args.url", "reward.init_args.api_key", "Authorization"):
        assert option in refused
    kept = {"model": config["model"], "rollout": {"reward": config["rollout"]["reward"]}}
    Path("secrets.yaml").write_text(yaml.safe_dump(kept))
    assert main(["fit", "--config", "run/config.yaml", "--config", "secrets.yaml"]) == 0
    assert "Resuming from" in capfd.readouterr().out


def test_no_secret_is_in_errors_or_printed_configs(
    config: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["fit", "--config", "c.yaml", "--print_config"])
    shown = capfd.readouterr()
    assert yaml.safe_load(shown.out)["rollout"]["reward"]["init_args"]["api_key"] == "<secret>"
    outputs = [shown.out + shown.err]
    for _ in range(4):
        assert main(["fit", "--config", "c.yaml", "--rollout.scoring.on_failure", "error"]) == 1
        outputs.append("".join(capfd.readouterr()))
    wrong = [
        ["--rollout.reward.init_args.url", f"ftp://alice:{PASSWORD}@host"],
        ["--rollout.reward.init_args.url", f"alice:{PASSWORD}@host/score"],
        ["--rollout.reward.init_args.api_key_env", KEY],
        ["--rollout.reward.init_args.api_key_env", "NOT_SET"],
        ["--trainer.max_epochs", "many", "--rollout.reward.init_args.apikey", LITERAL],
        ["--nonsense", f"http://alice:{PASSWORD}@host"],
    ]
    for arguments in wrong:
        with suppress(SystemExit):  # raised by the parser
            assert main(["fit", "--config", "c.yaml", *arguments]) == 1
        outputs.append("".join(capfd.readouterr()))
    (tmp_path / "conversations.jsonl").write_text('{"prompt": "Why?", "response": "So.", "n": 1}\n' * 3)
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"reward": config["rollout"]["reward"], "data": "conversations.jsonl"})
    )
    main(["score", "--config", "s.yaml", "--scoring.on_failure", "0.0", "--output", "scored.jsonl"])
    outputs += ["".join(capfd.readouterr()), Path("scored.jsonl").read_text()]
    assert main(["plan", "--config", "c.yaml"]) == 0
    outputs.append("".join(capfd.readouterr()))
    assert [find_leaks(output) for output in outputs] == [[]] * len(outputs)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("user", ["", f"me:{quote(PASSWORD, safe='')}@"])
def test_no_secret_is_in_the_reply_of_a_samplers_server(url: str, monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    monkeypatch.setenv("JUDGE_ACCESS", KEY)
    sampler = VLLMServerSampler(
        [f"http://{user}{url.rpartition('@')[2].partition('/')[0]}"], api_key_env="JUDGE_ACCESS"
    )
    with pytest.raises(InputError, match=r"status 403: x+") as refused:
        sampler._fleet.engines[0].call(f"/v1/models?token={QUERY}", get=True)
    assert find_leaks(str(refused.value)) == []
    assert find_leaks(describe(sampler)) == []
    assert ("<secret>@" in describe(sampler)) == bool(user)
