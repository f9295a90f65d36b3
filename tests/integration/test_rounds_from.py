"""A run trains again on the stored rounds of another one, without a sampler and without a reward."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_pl import PairwiseLoss, PolicyLoss, RebelLoss, SamplingConfig, TransformersSampler
from rlhf_pl.callbacks import RoundCheckpoint
from rlhf_pl.rounds.stored_rounds import is_off_policy
from rlhf_pl.store.round_store import Round, RoundStore
from rlhf_pl.utils.errors import InputError
from tests.conftest import save_llama
from tests.integration.test_fit import PROMPTS, assert_same, fit, weights

Again = Callable[..., tuple[L.Trainer, Any]]
KEY = ["prompt_id", "response_index"]
pytestmark = pytest.mark.xdist_group("rounds_from")  # they share runs


class NoSampler(TransformersSampler):
    """A sampler that must not be started."""

    def check(self) -> None:
        raise AssertionError("The sampler was checked.")

    def start(self, spec: Any) -> None:
        raise AssertionError("The sampler was started.")


def no_reward(response: str) -> float:
    raise AssertionError("The reward was called.")


class ToReference(PairwiseLoss):
    """(h - 5)^2 with log-ratios to the reference."""

    needs = frozenset({"rewards", "reference_logps"})

    def __call__(self, chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
        return (chosen - rejected - 5) ** 2


class WithoutReference(PolicyLoss):
    """A loss on pairs that needs no other policy."""

    needs = frozenset({"rewards"})
    per = "pair"

    def losses(self, groups: Any) -> Tensor:
        chosen, rejected = groups.pairs(groups.logps / groups.lengths)
        return -logsigmoid(chosen - rejected)


class PerToken(PolicyLoss):
    """A policy gradient with the ratio of every token, on whole groups."""

    needs = frozenset({"rewards", "old_token_logps"})
    per = "token"

    def losses(self, groups: Any) -> Tensor:
        advantages = groups.rewards - groups.group_means(groups.rewards)
        return -(groups.token_logps - groups.old_token_logps).exp() * groups.per_token(advantages)


class Weights(L.Callback):
    """The policy's weights at the end of every round."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        self.seen.append({name: tensor.clone() for name, tensor in module.weights().stream()})


class Source:
    """A run of two rounds that others train on again."""

    rounds: ClassVar[int] = 2

    def __init__(self, folder: Path, llama: Path, **refresh: Any) -> None:
        self.llama, self.prompts, self.dir = llama, folder / "prompts.jsonl", folder / "run"
        self.prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
        recorder = Weights()
        fit(self.dir, llama, str(self.prompts), [recorder], refresh=refresh, logger=False)
        self.weights, self.store = recorder.seen, RoundStore(self.dir)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Source:
    return Source(tmp_path_factory.mktemp("source"), llama)


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Source:
    return Source(tmp_path_factory.mktemp("with_tokens"), llama, store_token_logps=True)


def again_on(source: Source, run_dir: Path, loss: PolicyLoss | None = None, **options: Any) -> tuple[L.Trainer, Any]:
    """Train on the rounds of `source` in `run_dir`."""
    settings = {"max_epochs": 1, "logger": False} | options
    settings["attributes"] = {"rounds_from": str(source.dir)} | settings.get("attributes", {})
    settings["refresh"] = {"reward": no_reward, "sampler": NoSampler()} | settings.get("refresh", {})
    settings["module"] = ({} if loss is None else {"loss": loss}) | settings.get("module", {})
    llama, prompts = settings.pop("llama", source.llama), settings.pop("prompts", source.prompts)
    return fit(run_dir, llama, str(prompts), settings.pop("callbacks", None), **settings)


def test_the_same_config_ends_with_the_same_weights_after_every_round(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the second round is on-policy then: its responses come from the weights that this run has reached."""
    recorder = Weights()
    again_on(source, tmp_path / "run", callbacks=[recorder], max_epochs=2)
    for found, expected in zip(recorder.seen, source.weights, strict=True):
        assert_same(found, expected)
    store = RoundStore(tmp_path / "run")
    for index in range(2):
        stored, original = store.round(index), source.store.round(index)
        assert not is_off_policy(stored)
        assert stored.manifest["rounds_from"]["run"] == source.store.run != store.run
        for stage in ("responses", "rewards", "pairs", "logps"):
            names = [[file.name for file in s.shards(stage).values()] for s in (stored, original)]
            assert names[0] == names[1], stage  # the names hold checksums
        assert stored.find_damage() == []
    assert not store.evaluations()
    printed = capsys.readouterr().out
    assert "nothing is sampled for training or scored again" in printed
    assert "The 4 held-out prompts are not evaluated: --rollout.evaluate true" in printed
    assert "off-policy" not in printed


@pytest.mark.parametrize(
    "loss", [RebelLoss(0.5), ToReference(), WithoutReference(), PerToken()], ids=lambda x: type(x).__name__
)
def test_four_losses_train_on_one_stored_round(source: Source, tmp_path: Path, loss: PolicyLoss) -> None:
    _, module = again_on(source, tmp_path / "run", loss)
    stored = RoundStore(tmp_path / "run").round(0)
    assert stored.read("responses").equals(source.store.round(0).read("responses"))
    computed = {"RebelLoss": ["old"], "ToReference": ["reference"], "WithoutReference": [], "PerToken": ["old"]}
    assert stored.info("logps")["policies"] == computed[type(loss).__name__]
    pairs = stored.info("pairs")
    assert (pairs["selector"] is None) == (loss.per == "token")
    assert not torch.equal(weights(module)["model.norm.weight"], source.weights[0]["model.norm.weight"])


def test_a_later_round_is_off_policy_data_with_the_stored_log_probs(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another eta has led to another policy, so pi_old of the second round is not this run's."""
    firsts = []

    class First(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                rows = batch.rows
                with torch.no_grad():
                    logps = rows.sum_per_response(module(**rows.inputs(), temperature=batch.temperature))
                firsts.append((logps - batch.stored["old_logps"]).abs().max().item())

    again_on(source, tmp_path / "run", RebelLoss(0.5), callbacks=[First()], max_epochs=2)
    stored, original = RoundStore(tmp_path / "run").round(1), source.store.round(1)
    record = stored.manifest["rounds_from"]
    made_by = original.manifest["settings"]["responses"]
    assert {name: record[name] for name in ("weights", "policy_step")} == {
        name: made_by[name] for name in ("weights", "policy_step")
    }
    assert record["off_policy"]
    assert record["weights"] != stored.manifest["settings"]["responses"]["weights"]
    assert stored.read("logps").equals(original.read("logps"))
    assert stored.info("logps")["policies"] == ["given"]
    assert firsts[0] == 0
    assert firsts[1] > 1e-3
    printed = capsys.readouterr().out
    assert printed.count("note: round 2 is off-policy") == 1
    assert "pi_old is that policy: its log-probs are those stored there" in printed


def test_log_probs_that_are_missing_are_refused_at_the_start(source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)rounds/0001.*sums over responses, but none of each token.*_epochs 1"):
        again_on(source, tmp_path / "run", PerToken(), max_epochs=2)
    with pytest.raises(InputError, match=r"none for [1-9]\d* of the \d+ responses that are used.*store_token_logps"):
        again_on(source, tmp_path / "run", max_epochs=2, refresh={"selector": Others()})
    assert not (tmp_path / "run").exists()


class Others:
    """Selects the pair that the source has not used, where there are three responses."""

    def __new__(cls) -> Any:
        from rlhf_pl import PairSelector

        class MiddleWorst(PairSelector):
            def __call__(self, rewards: Any, lengths: Any, finished: Any, seed: int) -> list[tuple[int, int]]:
                order = sorted(range(len(rewards)), key=lambda i: rewards[i])
                return [(order[1], order[0])] if rewards[order[1]] > rewards[order[0]] else []

        return MiddleWorst()


def test_all_scored_responses_get_log_probs_of_every_token(source: Source, with_tokens: Source, llama: Path) -> None:
    """The training beside it is unchanged to the bit; the values are those of transformers' own forward pass."""
    from transformers import AutoModelForCausalLM

    for found, expected in zip(with_tokens.weights, source.weights, strict=True):
        assert_same(found, expected)
    stored = with_tokens.store.round(0)
    table, before = stored.read("logps"), source.store.round(0).read("logps")
    assert table.slice(0, len(before)).select(before.column_names).equals(before)
    assert len(table) == stored.info("rewards")["scored"] > len(before)
    responses = {(r["prompt_id"], r["response_index"]): r for r in stored.read("responses").to_pylist()}
    lm = AutoModelForCausalLM.from_pretrained(llama).eval()
    for row in table.to_pylist():
        response = responses.pop((row["prompt_id"], row["response_index"]))
        prompt, tokens = response["prompt_tokens"], response["response_tokens"]
        with torch.no_grad():
            logits = lm(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1] / 0.9
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
        torch.testing.assert_close(torch.tensor(row["old_token_logps"]), expected, rtol=1e-4, atol=1e-4)
        assert row["old_logp"] == pytest.approx(sum(row["old_token_logps"]), abs=1e-4)
    assert not responses
    assert table.schema.field("old_token_logps").type.value_type == "float"


def test_any_loss_trains_on_later_rounds_with_stored_tokens(with_tokens: Source, tmp_path: Path) -> None:
    again_on(with_tokens, tmp_path / "run", PerToken(), max_epochs=2)
    stored = RoundStore(tmp_path / "run").round(1)
    assert is_off_policy(stored)
    found = {tuple(r[k] for k in KEY): r["old_token_logps"] for r in stored.read("logps").to_pylist()}
    original = with_tokens.store.round(1).read("logps").to_pylist()
    expected = {tuple(r[k] for k in KEY): r["old_token_logps"] for r in original}
    assert found == {key: expected[key] for key in found}
    assert len(found) == with_tokens.store.round(1).info("rewards")["scored"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 3}, r"`trainer\.max_epochs` is 3, but .* has 2 rounds .*Set --trainer\.max_epochs 2 or fewer"),
        ({"data": {"prompts_per_round": 3}}, r"prompts_per_round: None -> 3 \(data\.prompts_per_round\)"),
        ({"data": {"val_prompts": 3}}, r"prompts: the prompts have changed.*\(data\.prompts, data\.val_prompts"),
        ({"module": {"dtype": "bfloat16"}}, r"dtype: float32 -> bfloat16 \(model\.dtype\)"),
        ({"attributes": {"rounds_from": "nowhere"}}, r"`--rounds_from`: 'nowhere' is not a folder"),
        ({"refresh": {"evaluate": True}, "data": {"val_prompts": 0}}, r"no held-out prompts. Set `data\.val_prompts`"),
        (
            {"refresh": {"evaluate": True, "reward": None}},
            r"`rollout\.evaluate` is true, which needs a `rollout\.reward`",
        ),
    ],
)
def test_what_contradicts_the_stored_rounds_is_refused(
    source: Source, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        again_on(source, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_another_start_is_refused_or_off_policy(source: Source, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=1)
    with pytest.raises(
        InputError,
        match=r"(?s)another policy than the one that this run starts from.*weights: the policy's weights have changed",
    ):
        again_on(source, tmp_path / "run", llama=other)
    assert not (tmp_path / "run").exists()
    again_on(source, tmp_path / "run", llama=other, attributes={"accept_changes": True})
    stored = RoundStore(tmp_path / "run").round(0)
    assert is_off_policy(stored)
    assert stored.read("logps").equals(source.store.round(0).read("logps"))


def test_the_own_directory_and_folders_without_rounds_are_refused(source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"which is also this run's directory.*--trainer\.default_root_dir DIR"):
        again_on(source, source.dir)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no rounds"):
        again_on(source, tmp_path / "run", attributes={"rounds_from": str(tmp_path / "empty")})


def test_settings_that_the_stored_ones_replace_are_named(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again_on(source, tmp_path / "run", refresh={"sampling": SamplingConfig(num_responses=2, max_response_tokens=8)})
    printed = capsys.readouterr().out
    assert (
        "note: the settings of the stored responses are used: num_responses 3, not 2; temperature 0.9, not 1.0."
        in printed
    )
    original = source.store.round(0).read("logps")
    assert RoundStore(tmp_path / "run").round(0).read("logps").equals(original)  # at the stored temperature


def copy_of(source: Source, folder: Path) -> Any:
    """The same run in another directory."""
    copy = Source.__new__(Source)
    vars(copy).update(vars(source) | {"dir": folder / "moved", "store": RoundStore(folder / "moved")})
    shutil.copytree(source.dir, copy.dir)
    return copy


def test_damaged_and_unfinished_rounds_are_refused_by_path(source: Source, tmp_path: Path) -> None:
    copy = copy_of(source, tmp_path)
    shard = next(iter(copy.store.round(0).shards("rewards").values()))
    content = shard.read_bytes()
    shard.write_bytes(content[:-10] + bytes(10))
    with pytest.raises(InputError, match=rf"{shard.name} is damaged: its checksum does not match. Restore it, or run "):
        again_on(copy, tmp_path / "run")
    shard.write_bytes(content)
    for stage in ("rewards", "logps"):  # of a later round, for a loss that reads no log-probs of it: at the start too
        file = next(iter(copy.store.round(1).shards(stage).values()))
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(InputError, match=rf"{file.name} is damaged: it is missing"):
            again_on(copy, tmp_path / "run", ToReference(), max_epochs=2)
        assert not (tmp_path / "run").exists()
        file.write_bytes(content)
    copy.store.round(1).reopen("rewards")
    with pytest.raises(InputError, match=r"has 1 round whose responses and rewards are complete"):
        again_on(copy, tmp_path / "run", max_epochs=2)


def test_the_copy_goes_on_without_the_other_run(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it copies the rewards, then stopped inside the training; the other run is gone by then."""
    copy = copy_of(source, tmp_path)
    write = Round.write_shard_bytes

    def die(stored: Round, stage: str, number: int, content: Any) -> None:
        if (stage, number) == ("rewards", 2):
            raise KeyboardInterrupt
        write(stored, stage, number, content)

    saves: dict[str, Any] = {"enable_checkpointing": True}
    with monkeypatch.context() as patch:
        patch.setattr(Round, "write_shard_bytes", die)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            again_on(copy, tmp_path / "run", callbacks=[RoundCheckpoint(1)], **saves)
    assert len(RoundStore(tmp_path / "run").round(0).shards("rewards")) == 2
    again_on(copy, tmp_path / "run", callbacks=[RoundCheckpoint(1)], max_steps=1, **saves)
    shutil.rmtree(copy.dir)
    recorder = Weights()
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    again_on(copy, tmp_path / "run", callbacks=[RoundCheckpoint(1), recorder], ckpt_path=last, **saves)
    again_on(source, tmp_path / "whole", callbacks=[whole := Weights()])
    assert_same(recorder.seen[-1], whole.seen[-1])
    with pytest.raises(InputError, match="is not a folder"):
        again_on(copy, tmp_path / "run", max_epochs=2, ckpt_path=last)


def test_a_damaged_copy_is_copied_again(source: Source, tmp_path: Path) -> None:
    again_on(source, tmp_path / "run", callbacks=[RoundCheckpoint(1)], enable_checkpointing=True)
    stored = RoundStore(tmp_path / "run").round(0)
    files = {stage: next(iter(stored.shards(stage).values())) for stage in ("responses", "given_logps", "rewards")}
    contents = {file: file.read_bytes() for file in files.values()}
    for file in files.values():
        file.write_bytes(b"damaged")
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    again_on(source, tmp_path / "run", ckpt_path=last, attributes={"repair": True})
    assert {file: file.read_bytes() for file in files.values()} == contents


def test_a_run_on_stored_rounds_can_itself_be_trained_on(source: Source, tmp_path: Path) -> None:
    """The log-probs under pi_old and the name of the first run's policy are passed on."""
    again_on(source, tmp_path / "b", RebelLoss(0.5), max_epochs=2)
    b = copy_of(source, tmp_path)
    b.dir = tmp_path / "b"
    again_on(b, tmp_path / "c", RebelLoss(0.25), max_epochs=2)
    found, original = RoundStore(tmp_path / "c").round(1), source.store.round(1)
    assert found.manifest["rounds_from"]["weights"] == original.manifest["settings"]["responses"]["weights"]
    assert found.read("logps").equals(original.read("logps"))


def test_a_run_that_samples_can_leave_out_the_evaluation(source: Source, tmp_path: Path) -> None:
    fit(tmp_path / "run", source.llama, str(source.prompts), refresh={"evaluate": False}, logger=False, max_epochs=1)
    store = RoundStore(tmp_path / "run")
    assert not store.evaluations()
    assert store.round(0).read("responses").equals(source.store.round(0).read("responses"))


def test_held_out_prompts_are_evaluated_on_request(source: Source, tmp_path: Path) -> None:
    refresh = {"evaluate": True, "reward": "tests.integration.test_fit.reward", "sampler": TransformersSampler()}
    again_on(source, tmp_path / "run", refresh=refresh)
    store = RoundStore(tmp_path / "run")
    found, expected = (s.held_out(0).read("responses") for s in (store, source.store))
    assert found.equals(expected)
    assert store.held_out(0).info("pairs")["pairs"] == source.store.held_out(0).info("pairs")["pairs"] > 0
    assert store.held_out(1).info("kl")["new_old"] != 0
