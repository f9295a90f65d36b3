"""The devices that a plan is made for: their kind, number, memory and speed."""

import os
import time
from typing import Any

import torch

from rlhf_pl.utils.devices import cpu_has_bfloat16

GPU_BYTES = 80 * 2**30  # of a GPU that is not in this machine
GPU_TFLOPS, GPU_TOKENS_PER_S = 150.0, 3000.0
_SHARE_OF_MATMUL = 0.5  # of a matrix product's speed that training and sampling reach


def plans_gpus(accelerator: Any) -> bool:
    """Whether a Trainer with this `accelerator` gets GPUs; `auto` takes those of this machine."""
    if accelerator in ("gpu", "cuda"):
        return True
    return accelerator != "cpu" and torch.cuda.is_available()


def count_devices(devices: Any, on_gpu: bool) -> int:
    """Devices of a node; `auto` is one process on a CPU and all GPUs of a machine that has them."""
    if isinstance(devices, list | tuple):
        return len(devices)
    text = str(devices).strip()
    if text.isdigit():
        return int(text)
    if "," in text:  # Lightning's list of indices, such as 0,1
        return len([part for part in text.split(",") if part.strip()])
    return max(1, torch.cuda.device_count()) if on_gpu else 1


def device_bytes(on_gpu: bool, processes: int) -> float:
    """Memory of a GPU, or a CPU process's share of this machine's; bytes.

    Args:
        on_gpu: Whether the devices are GPUs.
        processes: Processes of a node.
    """
    if on_gpu and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    if on_gpu:
        return float(GPU_BYTES)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes


def measure_cpu_tflops(half: bool, processes: int, seconds: float = 0.7) -> float:
    """The speed of this machine's CPU in training for each of `processes`, TFLOP/s, by a short measurement.

    Args:
        half: Whether matrix products are in bfloat16.
        processes: Processes that share the cores.
        seconds: Duration of the measurement.
    """
    dtype = torch.bfloat16 if half and cpu_has_bfloat16() else torch.float32
    rows, size = 512, 1024
    left, right = torch.ones(rows, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    left @ right  # the first one prepares kernels
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        left @ right
        done += 1
    speed = done * 2 * rows * size * size / (time.perf_counter() - start)
    return _SHARE_OF_MATMUL * speed / 1e12 / processes
