"""A value head on the hidden states of a policy, and its file beside the exported policy."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pl.models.source import ModelSource
from rlhf_pl.utils.errors import InputError, first_line

FOLDER = "critic"  # beside the weights of an exported policy
FILE = "value_head.safetensors"


def apply_value_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Values in float32, without autocast: in bfloat16, values near 10 have steps of 0.06; shape (M, H) to (M,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden.float(), head.weight.float(), bias)[:, 0]


def make_value_head(lm: Any, source: ModelSource, seed: int) -> nn.Linear:
    """The head that a policy starts with: that of an exported run beside its weights, or a new one.

    A new one is random, with values of standard deviation near 1 (as in arXiv:2009.01325).

    Args:
        lm: The policy's causal LM; its dtype is that of the head.
        source: Where it came from.
        seed: Seed of a new head.
    """
    width = lm.get_output_embeddings().weight.shape[1]
    with torch.device("cpu"):
        head = nn.Linear(width, 1)
    stored = read_value_head(source)
    with torch.no_grad():
        if stored is not None:
            head.weight.copy_(stored["weight"])
            head.bias.copy_(stored["bias"])
        else:
            noise = torch.randn(1, width, generator=torch.Generator().manual_seed(seed), device="cpu")
            head.weight.copy_(noise * (width + 1) ** -0.5)
            head.bias.zero_()
    return head.to(lm.dtype)


def read_value_head(source: ModelSource, width: int | None = None) -> dict[str, Tensor] | None:
    """The head beside the weights of an exported policy; None if its folder has none.

    Args:
        source: The policy.
        width: The width of its hidden states, to check; None not to.

    Raises:
        InputError: The file can't be read, or is the head of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(source.path) / FOLDER / FILE
    if not file.is_file():
        return None
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"`{source.option}`: {file} can't be read: {first_line(error)}. Copy it again, or remove it for a new head."
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    own = state["weight"].shape[-1] if width is None and "weight" in state else width
    if shapes != {"weight": (1, own), "bias": (1,)} or not all(tensor.isfinite().all() for tensor in state.values()):
        raise InputError(
            f"`{source.option}`: {file} does not hold the value head of this model, with `weight` of shape (1, {own}) "
            "and `bias` of shape (1,). Remove it for a new head."
        )
    return state


def save_value_head(state: dict[str, Tensor], folder: str) -> None:
    """Write a head for `read_value_head`, float32, in the folder of an exported policy."""
    from safetensors.torch import save_file

    target = Path(folder) / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().float().contiguous() for name, tensor in state.items()}, target / FILE)
