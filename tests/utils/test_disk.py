import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_pl.checkpointing.checkpoints import AtomicCheckpointIO
from rlhf_pl.distributed.gather_weights import weights_of
from rlhf_pl.rollout import SamplingConfig
from rlhf_pl.rounds import disk_space as round_space
from rlhf_pl.store.round_store import RoundStore
from rlhf_pl.utils.disk import DiskFullError, check_space, format_bytes, free_bytes, full_disk_error, write_atomically


def test_sizes_have_units() -> None:
    assert [format_bytes(n) for n in (12, 2048, 3 * 2**20, 5.5 * 2**30)] == [
        "12 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "5.5 GiB",
    ]


def test_too_little_free_space_is_refused_with_the_needed_size(tmp_path: Path) -> None:
    check_space(tmp_path / "new" / "run", {"answers": 1}, "round 1")
    with pytest.raises(
        DiskFullError, match=r"round 1 needs about .* GiB .*answers 10\.0 KiB.* are free\. Free .* more"
    ):
        check_space(tmp_path / "new" / "run", {"answers": 10240, "checkpoint": 2**60}, "round 1")


def test_a_round_needs_space_for_two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the kept ones. Without a checkpoint yet: the weights, and AdamW's moments of the trainable ones."""
    checked: list[dict[str, int]] = []
    monkeypatch.setattr(round_space, "check_space", lambda folder, parts, before: checked.append(parts))
    policy = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 30, bias=False))
    policy[1].requires_grad_(False)  # a quarter of the weights trains
    module = SimpleNamespace(policy=policy, needs=(), weights=lambda: weights_of(policy.state_dict()))
    data = SimpleNamespace(store=RoundStore(tmp_path), round_prompts=lambda index: [])
    options = SimpleNamespace(sampling=SamplingConfig(), refill=0, store_token_logps=False, old_logps="policy")
    trainer = SimpleNamespace(checkpoint_callbacks=[object()], max_epochs=2)

    def parts(index: int) -> dict[str, int]:
        round_space.check_disk_space(trainer, module, data, options, index)  # type: ignore[arg-type]
        return checked[-1]

    assert parts(0) == {"responses": 0, "2 checkpoints": 2 * (1600 + 2 * 400)}
    (tmp_path / "checkpoints" / "after-round-0001.ckpt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "after-round-0001.ckpt" / "meta.pt").write_bytes(bytes(70))
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("after-round-0001.ckpt")
    assert parts(1) == {"responses": 0, "2 checkpoints": 140, "final model": 1600}
    update = tmp_path / "checkpoints" / "update-00000009.ckpt"
    update.write_bytes(bytes(90))
    os.utime(update, (2e9, 2e9))
    assert parts(0)["2 checkpoints"] == 180
    trainer.checkpoint_callbacks = []
    assert parts(0) == {"responses": 0}


def test_a_critic_needs_space_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 weights of the policy and 50 of the critic, all of which train."""
    checked: list[dict[str, int]] = []
    monkeypatch.setattr(round_space, "check_space", lambda folder, parts, before: checked.append(parts))
    policy, critic = torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 5, bias=False)
    module = SimpleNamespace(policy=policy, critic=critic, needs=(), weights=lambda: weights_of(policy.state_dict()))
    module.critic_weights = lambda: weights_of(critic.state_dict())
    data = SimpleNamespace(store=RoundStore(tmp_path), round_prompts=lambda index: [])
    trainer = SimpleNamespace(checkpoint_callbacks=[object()], max_epochs=1)
    options = SimpleNamespace(sampling=SamplingConfig(), refill=0, store_token_logps=False, old_logps="policy")
    round_space.check_disk_space(trainer, module, data, options, 0)  # type: ignore[arg-type]
    assert checked == [{"responses": 0, "2 checkpoints": 2 * 3 * 600, "final model": 600}]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, lambda file: file.write(b"old"))

    def full(file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFullError, match=r"needs 5\.0 KiB"):
        write_atomically(target, full, 5120)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_errors_of_torch_are_explained_by_the_free_space(tmp_path: Path) -> None:
    error = RuntimeError("PytorchStreamWriter failed writing file")
    assert full_disk_error(tmp_path / "x", error, needed=2 * free_bytes(tmp_path)) is not None
    assert full_disk_error(tmp_path / "x", error, needed=10) is None
    assert full_disk_error(tmp_path / "x", ValueError("other"), needed=2 * free_bytes(tmp_path)) is None


def test_checkpoints_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, file = AtomicCheckpointIO(), tmp_path / "a" / "x.ckpt"
    io.save_checkpoint({"state": torch.arange(3)}, file)
    assert torch.equal(io.load_checkpoint(file)["state"], torch.arange(3))

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(DiskFullError, match="it needs 24 bytes"):
        io.save_checkpoint({"state": torch.arange(3)}, file)
    assert [f.name for f in file.parent.iterdir()] == ["x.ckpt"]
