"""Short hashes that tell whether a stored round was made from the same things."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf_pl.data.prompts import Prompt


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short hash that changes with any weight, whatever device they are on."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in weights.items():
            wide = tensor.double()
            # ten digits: the last ones depend on the order of summation, and so on the device
            digest.update(f"{name}:{wide.sum().item():.10e}:{wide.square().sum().item():.10e}".encode())
    return digest.hexdigest()[:16]


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """A short hash of the prompts' ids and token ids, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.prompt_id}:{prompt.token_ids}".encode())
    return digest.hexdigest()[:16]
