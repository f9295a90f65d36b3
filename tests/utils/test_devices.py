"""The dtype that a CPU computes in."""

import pytest
import torch

from rlhf_pl.utils import devices


@pytest.mark.parametrize(
    ("capabilities", "has_bfloat16"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
    ],
)
def test_only_instructions_for_bfloat16_keep_half_precision(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], has_bfloat16: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    devices.cpu_has_bfloat16.cache_clear()
    try:
        used = devices.fast_precision("bf16-mixed", on_gpu=False)
        assert used == ("bf16-mixed" if has_bfloat16 else "32-true")
        assert bool(devices.describe_precision("bf16-mixed", used)) is not has_bfloat16
        assert devices.fast_precision("bf16-mixed", on_gpu=True) == "bf16-mixed"
        assert devices.fast_dtype("bfloat16", "cpu") == ("bfloat16" if has_bfloat16 else "float32")
    finally:
        devices.cpu_has_bfloat16.cache_clear()
