"""A vLLM worker's end of the weight transfer by TCP."""

import socket
import time
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import base

from rlhf_pl.distributed.listener import join
from rlhf_pl.rollout.vllm_experts import Kernels, check_kernels, detach_kernels
from rlhf_pl.rollout.weight_sync.plugin import PART_TIMEOUT_S, read_exactly


@dataclass
class InitInfo(base.WeightTransferInitInfo):
    """The trainer's address, the token that it requires, and the time limit for a part of the weights."""

    address: str
    port: int
    token: str
    timeout_s: float = PART_TIMEOUT_S


@dataclass
class UpdateInfo(base.WeightTransferUpdateInfo):
    """Describes the next tensors; their bytes follow on the connection, one tensor after another."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class TCPWeightTransferEngine(base.WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives whole tensors from the trainer by TCP; a worker holds one at a time in addition to its model."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _connection: socket.socket | None = None
    _timeout_s = PART_TIMEOUT_S
    _kernels: Kernels = []  # noqa: RUF012 - replaced, never mutated

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self.shutdown()
        self._connection = join(init_info.address, init_info.port, init_info.token)
        self._timeout_s = init_info.timeout_s

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if torch.device(self.device).type == "cpu":
            self._kernels = detach_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        check_kernels(self._kernels, self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # the base class synchronizes an accelerator

    def receive_weights(self, update_info: UpdateInfo) -> None:
        if self._connection is None:
            raise RuntimeError("No trainer is connected.")
        end = time.monotonic() + self._timeout_s
        try:
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                read_exactly(self._connection, weight.view(-1).view(torch.uint8).numpy().data, end)
                # Gemma-2 has no module for its tied head
                if name != "lm_head.weight" or not self._is_tied() or hasattr(self.model, "lm_head"):
                    self.model.load_weights([(name, weight.to(self.device))])
        except BaseException:
            self.shutdown()  # otherwise the trainer would wait for this reader
            raise

    def _is_tied(self) -> bool:
        return bool(self.model_config.hf_config.get_text_config().tie_word_embeddings)

    def shutdown(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
