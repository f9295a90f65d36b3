"""Silences the libraries' warnings and logs."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Hide the libraries' warnings and logs. `RLHF_PL_VERBOSE=1` keeps them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # policies train in eval mode on purpose
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if os.environ["VLLM_LOGGING_LEVEL"] == "ERROR":
        logging.getLogger("vllm").setLevel(logging.ERROR)  # until vLLM sets up its own logging
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\..*")
    if os.environ.get("RLHF_PL_VERBOSE") == "1":
        return
    for name in (
        "lightning.pytorch",
        "lightning.fabric",
        "transformers",
        "datasets",
        "huggingface_hub",
        "filelock",
        "bitsandbytes",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|jsonargparse|vllm)\b.*")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
