"""No option and no config file causes a library's traceback, a hang or an incomplete run directory."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_pl.__main__ import main
from rlhf_pl.rewards.time_limit import call_with_time_limit
from rlhf_pl.store.round_store import RoundStore

OPTIONS = [
    *("model.policy", "model.loss", "model.loss.eta", "model.optimizer", "model.optimizer.lr", "model.optimizer.betas"),
    *("model.lr_scheduler", "model.lr_scheduler.warmup", "model.lr_scheduler.min_factor", "model.kl_coef"),
    *("model.reference", "model.dtype", "model.attn_implementation", "model.logprob_chunk_tokens"),
    *("model.chat_template", "model.gradient_checkpointing", "data.prompts", "data.columns", "data.columns.prompt"),
    *("data.split", "data.system_prompt", "data.max_prompt_tokens", "data.val_prompts", "data.prompts_per_round"),
    *("data.batch_size", "data.max_val_pairs", "data.num_workers", "data.seed", "rollout.reward", "rollout.sampler"),
    *("rollout.sampling", "rollout.sampling.num_responses", "rollout.sampling.temperature", "rollout.sampling.top_p"),
    *("rollout.sampling.top_k", "rollout.sampling.min_p", "rollout.sampling.max_response_tokens", "rollout.scoring"),
    *("rollout.scoring.timeout_s", "rollout.scoring.retries", "rollout.scoring.on_failure", "rollout.selector"),
    *("rollout.scoring.prompts_per_call", "rollout.val_num_responses", "rollout.val_temperature"),
    *("rollout.prompts_per_shard", "rollout.logps_batch_tokens", "samples.num_prompts", "export.folder"),
    *("export.dtype", "export.every_round", "checkpoint.every_n_updates", "checkpoint.keep_rounds", "guards.max_kl"),
    *("guards.stop_on", "guards.max_length_ratio", "seed_everything", "trainer.accumulate_grad_batches"),
    *(
        "trainer.max_steps",
        "trainer.precision",
        "trainer.gradient_clip_val",
        "trainer.logger",
    ),  # devices and nodes would start processes
    *("trainer.log_every_n_steps", "trainer.callbacks", "trainer.strategy", "trainer.limit_train_batches"),
    *("trainer.enable_checkpointing", "trainer.val_check_interval", "trainer.max_time"),
    *("trainer.accelerator", "trainer.plugins", "ckpt_path", "config", "optimizer", "nonsense", "trainer"),
]
VALUES = st.sampled_from(
    [
        *(
            "nan",
            "inf",
            "-inf",
            "-1",
            "0",
            "1",
            "2",
            "0.5",
            "1e400",
            ".nan",
            "-.inf",
            "99999999999999999999",
            "null",
            "",
            " ",
            "[]",
            "{}",
        ),
        *("{}", "true", "no", "x", "[1, 2]", "{a: 1}", "'", '"', "{", "- -", "&a [*a]", "∞"),
        *("!!python/object:os.system {}", "{class_path: nothing.Here}", "{class_path: RebelLoss, init_args: {eta: 2}}"),
        *("../x", "/", "/dev/null", "missing.yaml", "TransformersSampler", "BestWorst", "torch.optim.SGD", "os.system"),
        *("resume.nothing", "bf16-mixed", "16-true", "auto", "last", "all", "drop", "x" * 300, "\x00"),
        "{class_path: os.getcwd}",
    ]
)


@pytest.fixture
def base(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    rows = [{"prompt_id": f"p{i}", "prompt": f"What is {i}?"} for i in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "fuzz_reward.py").write_text("def score(response):\n    return len(set(response))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return {
        **{"model.policy": str(llama), "data.prompts": "prompts.jsonl", "data.max_prompt_tokens": "40"},
        **{"rollout.reward": "fuzz_reward.score", "rollout.sampler": "TransformersSampler"},
        **{"rollout.sampling.max_response_tokens": "3", "rollout.sampling.num_responses": "2"},
        **{"trainer.max_epochs": "1", "trainer.accelerator": "cpu", "trainer.default_root_dir": "run"},
        **{"rollout.scoring.backoff_s": "0", "data.val_prompts": "1"},
    }


def assert_accepted_or_refused(arguments: list[str]) -> None:
    """Exit code 0, or 1 or 2 with one error of a few lines; no traceback; a valid run directory or none."""
    shutil.rmtree("run", ignore_errors=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        result = call_with_time_limit(lambda: main(arguments), 120, "fit")
    assert not result.timed_out
    if result.error is not None and not isinstance(result.error, SystemExit):
        raise result.error
    code = result.value if result.error is None else result.error.code
    text = err.getvalue()
    assert "Traceback" not in text
    if code != 0:
        assert code in (1, 2), (code, text)
        assert text.count("error: ") == 1, text
        assert len(text.splitlines()) < 25, text
    if Path("run").exists():
        store = RoundStore("run")
        assert store.find_damage() == []
        assert not list(Path("run").rglob("*.tmp"))
        assert not (Path("run") / ".lock").exists()
        assert code == 0 or store.rounds() or store.evaluations(), (arguments, text)


FUZZ = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.slow(minutes=0.7)
@pytest.mark.timeout(900)
def test_any_value_of_any_option(base: dict[str, str]) -> None:
    @settings(FUZZ, max_examples=120)
    @given(st.dictionaries(st.sampled_from(OPTIONS), VALUES, min_size=1, max_size=2))
    def check(changes: dict[str, str]) -> None:
        assert_accepted_or_refused(["fit", *(f"--{name}={value}" for name, value in (base | changes).items())])

    check()


@pytest.mark.timeout(300)
def test_any_config_file(base: dict[str, str]) -> None:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    nested = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=2))
    files = st.binary(max_size=60) | st.dictionaries(KEYS, nested, max_size=3).map(lambda d: yaml.safe_dump(d).encode())

    @settings(FUZZ, max_examples=40)
    @given(files)
    def check(content: bytes) -> None:
        Path("fuzz.yaml").write_bytes(content)
        given: list[Any] = [f"--{name}={value}" for name, value in base.items()]
        assert_accepted_or_refused(["fit", "--config", "fuzz.yaml", *given])

    check()


KEYS = st.sampled_from(
    ["model", "data", "rollout", "trainer", "class_path", "init_args", "sampling", "max_epochs", "x"]
)
