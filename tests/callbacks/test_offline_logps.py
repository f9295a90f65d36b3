"""Log-probs of offline pairs under pi_old: from a forward pass of the starting policy, or from the data.

The tests compare the training loss with log-probs of plain transformers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from rlhf_pl import OfflineDataModule, PolicyLoss, PromptGroups, RebelLoss, RebelModule
from rlhf_pl.callbacks import OfflineLogps
from rlhf_pl.optim import AdamW
from rlhf_pl.store.provenance import ChangedSettingsError
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.errors import InputError
from tests.callbacks.conftest import Log
from tests.conftest import make_tokenizer, save_llama
from tests.data.test_offline_datamodule import PLAIN, published

ETA = 2.0
Write = Callable[..., str]


class Start(L.Callback):
    """Records the policy's weights at the start of each epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        self.weights.append({name: tensor.clone() for name, tensor in module.weights().stream()})


def train(
    folder: Path, llama: Path, file: str, module: dict[str, Any] | None = None, epochs: int = 1, **data: Any
) -> tuple[list[float], Start]:
    """Train; return the loss of each epoch, which is one update over all pairs, and the weights before it."""
    L.seed_everything(4, verbose=False)
    start, log = Start(), Log()
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, max_epochs=epochs, logger=log, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[OfflineLogps(), start],
    )  # fmt: skip
    rebel = RebelModule(
        str(llama), **{"loss": RebelLoss(ETA), "optimizer": lambda p: AdamW(p, lr=1e-3)} | (module or {})
    )
    trainer.fit(rebel, datamodule=OfflineDataModule(file, **{"batch_size": 100} | data))
    return [loss for _, loss in log.of("train/loss")], start


def logps(folder: Path, rows: list[dict[str, Any]], weights: Any = None, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of chosen and rejected responses with their EOS, by plain transformers; shape (pairs, 2)."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), make_tokenizer()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
    found = []
    for row in rows:
        prompt = tokenizer(f"<s><|user|>{row['prompt']}<|end|><|assistant|>", add_special_tokens=False)["input_ids"]
        for which in ("chosen", "rejected"):
            response = tokenizer(row[which] + "<|end|>", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + response])
            with torch.no_grad():
                table = (model(ids).logits[0, :-1].double() / temperature).log_softmax(-1)
            found.append(table.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum())
    return torch.stack(found).view(-1, 2)


def rewards(rows: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([[row["chosen_reward"], row["rejected_reward"]] for row in rows], dtype=torch.double)


def margins(values: torch.Tensor) -> torch.Tensor:
    return values[:, 0] - values[:, 1]


def rebel_mean(now: torch.Tensor, old: torch.Tensor, scores: torch.Tensor) -> float:
    """Mean squared error of the log-ratio margins against the scaled score margins."""
    return ((margins(now - old) - ETA * margins(scores)) ** 2).mean().item()


def test_log_ratios_of_every_epoch_are_relative_to_the_starting_policy(
    llama: Path, tmp_path: Path, write_jsonl: Write
) -> None:
    """At the temperature of the data. The log-ratios of the first update are 0, those of the second are not."""
    losses, start = train(tmp_path, llama, write_jsonl(PLAIN), epochs=2, temperature=0.7)
    old = logps(llama, PLAIN, temperature=0.7)
    moved = logps(llama, PLAIN, start.weights[1], temperature=0.7)
    assert (moved - old).abs().max() > 0.1
    expected = [rebel_mean(now, old, rewards(PLAIN)) for now in (old, moved)]
    assert losses == pytest.approx(expected, rel=1e-4)


def test_given_log_probs_are_used_with_a_warning_if_they_differ(
    llama: Path, tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl([published(row, chosen_logprob=-12.5, reject_logprob=-20.25) for row in PLAIN])
    now, given = logps(llama, PLAIN), torch.tensor([[-12.5, -20.25]]).double()
    (loss,), _ = train(tmp_path / "given", llama, file)
    assert loss == pytest.approx(rebel_mean(now, given, rewards(PLAIN)), rel=1e-4)
    tokenizer = make_tokenizer()
    tokens = [[len(tokenizer(row[w] + "<|end|>")["input_ids"]) - 1 for w in ("chosen", "rejected")] for row in PLAIN]
    difference = ((now - given).abs() / torch.tensor(tokens))[:4].mean().item()  # of the first pairs
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"the log-probs in the data differ by {difference:.2f} nats a token from this policy's at temperature 1."
        in printed
    )
    (own,), _ = train(tmp_path / "own", llama, file, use_logprobs=False)
    assert own == pytest.approx(rebel_mean(now, now, rewards(PLAIN)), rel=1e-4)
    assert "nats a token" not in capsys.readouterr().out


def test_given_log_probs_of_the_policy_give_no_warning(
    llama: Path, tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = zip(PLAIN, logps(llama, PLAIN).tolist(), strict=True)
    train(tmp_path, llama, write_jsonl([published(r, chosen_logprob=a, reject_logprob=b) for r, (a, b) in rows]))
    assert "nats a token" not in capsys.readouterr().out


def test_the_reference_can_be_another_model(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    """Rewards are reduced by `kl_coef` times log pi_old - log pi_ref."""
    reference = save_llama(tmp_path / "reference", seed=7)
    module = {"kl_coef": 0.05, "reference": str(reference)}
    (loss,), _ = train(tmp_path / "run", llama, write_jsonl(PLAIN), module)
    old, ref = logps(llama, PLAIN), logps(reference, PLAIN)
    penalized = rewards(PLAIN) - 0.05 * (old - ref)
    assert loss == pytest.approx(rebel_mean(old, old, penalized), rel=1e-3)
    assert abs(loss - rebel_mean(old, old, rewards(PLAIN))) > 0.1


def test_stored_log_probs_are_not_computed_again(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    file = write_jsonl(PLAIN)
    first, _ = train(tmp_path, llama, file, val_pairs=3)
    files = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in (tmp_path / "rounds").rglob("*") if f.is_file()}
    held_out = json.loads((tmp_path / "heldout" / "0000" / "manifest.json").read_text())
    assert files
    assert held_out["stages"]["pairs"]["pairs"] == 3
    second, _ = train(tmp_path, llama, file, val_pairs=3)
    assert second == first
    assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files} == files


def test_other_pairs_in_a_run_directory_are_refused(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    train(tmp_path, llama, write_jsonl(PLAIN))
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(ChangedSettingsError, match=r"temperature: 1\.0 -> 0\.5"):
        train(tmp_path, llama, write_jsonl(PLAIN), temperature=0.5)
    with pytest.raises(ChangedSettingsError, match=r"pairs: 10 -> 9"):
        train(tmp_path, llama, write_jsonl(PLAIN[:9], "prompts.jsonl"))
    assert {f: f.read_bytes() for f in before if f.suffix != ".jsonl"} == {
        f: content for f, content in before.items() if f.suffix != ".jsonl"
    }


def test_modules_that_do_not_train_on_pairs_are_refused(llama: Path, tmp_path: Path, write_jsonl: Write) -> None:
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path / "run", max_epochs=1, logger=False, callbacks=[OfflineLogps()],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(InputError, match="BoringModel"):
        trainer.fit(BoringModel(), datamodule=OfflineDataModule(write_jsonl(PLAIN)))
    with pytest.raises(InputError, match=r"`logps_batch_tokens` must be 1 or more, got 0"):
        OfflineLogps(0)


def test_changed_rotary_factors_are_refused(tmp_path: Path, write_jsonl: Write) -> None:
    """Longer held-out pairs would give the stored log-probs, and training, other factors."""
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    folder = save_llama(
        tmp_path / "llama", rope_parameters=longrope | {"original_max_position_embeddings": 40, "factor": 8.0}
    )
    run, file = tmp_path / "run", write_jsonl(PLAIN)
    train(run, folder, file)
    manifest = RoundStore(run).round(0).manifest
    assert manifest["settings"]["pairs"]["rotary_factors"] == "longrope, up to 40 positions"
    longer = write_jsonl([row | {"chosen": "Red, green and blue. " * 20} for row in PLAIN], "val.jsonl")
    with pytest.raises(ChangedSettingsError, match=r"rotary_factors: longrope, up to 40 .* -> longrope, over 40"):
        train(run, folder, file, val_pairs=longer)


class Weighted(PolicyLoss):
    """A loss on pairs with importance weights."""

    needs = frozenset({"rewards", "old_token_logps", "sampling_token_logps"})
    per = "token"
    on_pairs = True

    def losses(self, groups: PromptGroups) -> torch.Tensor:
        return -(groups.old_token_logps - groups.stored["sampling_token_logps"]).exp() * groups.token_logps


def test_importance_weights_are_refused_for_pairs(tmp_path: Path, llama: Path, write_jsonl: Write) -> None:
    with pytest.raises(InputError, match=r"Weighted has importance weights.*pairs from a file have no sampler"):
        train(tmp_path / "run", llama, write_jsonl(PLAIN), module={"loss": Weighted()})
    assert not (tmp_path / "run").exists()
