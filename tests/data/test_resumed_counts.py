"""An epoch can be resumed in its middle with other micro-batches per update, but not with other pairs per update."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.callbacks import RoundCheckpoint
from rlhf_pl.utils.errors import InputError
from tests.integration.test_fit import PROMPTS, fit, weights


def test_an_epoch_is_resumed_with_the_same_pairs_per_update_only(
    tmp_path: Path, llama: Path, write_jsonl: Callable[..., str]
) -> None:
    """Stop after the first of three updates of 2 micro-batches x 2 pairs; resume with 4 x 1 and with 1 x 4."""
    prompts = write_jsonl(PROMPTS)

    def run(folder: str, batch_size: int, accumulate: int, **options: Any) -> Any:
        options |= {"max_epochs": 1, "enable_checkpointing": True, "accumulate_grad_batches": accumulate}
        data = {"batch_size": batch_size, "val_prompts": 4}
        return fit(tmp_path / folder, llama, prompts, [RoundCheckpoint(0)], data=data, **options)

    trainer, whole = run("whole", 2, 2)
    expected = weights(whole)
    updates = trainer.global_step
    for folder, batch_size, accumulate in (("small", 1, 4), ("large", 4, 1)):
        run(folder, 2, 2, max_steps=1)
        last = str((tmp_path / folder / "checkpoints" / "last.ckpt").resolve())
        assert last.endswith("update-00000001.ckpt")
        with pytest.raises(InputError, match=r"an epoch of 4 pairs or rows per update, and this run has 6"):
            run(folder, 3, 2, ckpt_path=last)
        trainer, module = run(folder, batch_size, accumulate, ckpt_path=last)
        assert trainer.global_step == updates
        for name, tensor in weights(module).items():
            assert (tensor - expected[name]).abs().max() < 2e-5, name
