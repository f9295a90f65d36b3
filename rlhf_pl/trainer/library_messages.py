"""Hides the libraries' messages while a block runs, and restores what it has changed."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("lightning.pytorch", "lightning.fabric", "transformers", "datasets", "huggingface_hub", "filelock", "vllm")
LIBRARIES = r"(lightning|torch|transformers|jsonargparse|vllm)\b.*"
_VARIABLES = {"TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR"}


@contextmanager
def hidden_messages() -> Iterator[None]:
    """Context in which libraries log errors only, warn of nothing and show no progress bars of their own.

    Their warnings are about what runs do on purpose, such as training in eval mode. `RLHF_PL_VERBOSE=1` keeps them. The
    warnings of users' own code are shown.
    """
    if os.environ.get("RLHF_PL_VERBOSE") == "1":
        yield
        return
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    missing = [name for name in _VARIABLES if name not in os.environ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=LIBRARIES)
        os.environ.update({name: _VARIABLES[name] for name in missing})
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if had_bars:
                transformers_logging.enable_progress_bar()
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for name in missing:
                os.environ.pop(name, None)
