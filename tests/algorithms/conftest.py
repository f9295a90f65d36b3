"""The command on a round of seven prompts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_pl.__main__ import main
from tests.algorithms.trained_round import CONFIG, REWARD
from tests.conftest import save_llama


@pytest.fixture(scope="session")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `llama` with 29 end tokens: its responses have 1 to 32 tokens, and some are truncated there."""
    folder = save_llama(tmp_path_factory.mktemp("models") / "brief")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(range(1, 30))}))
    return folder


@pytest.fixture
def fit(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`rlhf-pl fit` with seven prompts, so that micro-batches differ in size; both passes are one update each."""
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i} plus {i}?"} for i in range(7)]
    texts = {"prompts.jsonl": "\n".join(map(json.dumps, rows)), "users_reward.py": REWARD, "users.yaml": CONFIG}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments: str) -> int:
        given = ("--model.policy", str(llama), "--data.prompts", "prompts.jsonl")
        return main(["fit", "--config", "users.yaml", *given, "--rollout.reward", "users_reward.score", *arguments])

    return run
