"""Lightning callbacks, imported as `rlhf_pl.callbacks`."""

if __name__ != "rlhf_pl.callbacks":
    raise ImportError("Import `rlhf_pl.callbacks`: plain `callbacks` would be a second copy of the same classes.")

from rlhf_pl.callbacks.degeneration_guard import DegenerationGuard
from rlhf_pl.callbacks.epoch_run import EpochRun
from rlhf_pl.callbacks.hf_export import HFExport
from rlhf_pl.callbacks.offline_logps import OfflineLogps
from rlhf_pl.callbacks.round_checkpoint import RoundCheckpoint
from rlhf_pl.callbacks.round_progress import RoundProgress
from rlhf_pl.callbacks.round_refresh import RoundRefresh
from rlhf_pl.callbacks.run_report import RunReport
from rlhf_pl.callbacks.sample_table import SampleTable
from rlhf_pl.callbacks.stop_on_signal import StopOnSignal
from rlhf_pl.checkpointing.stop_request import RunStopped

__all__ = [
    "DegenerationGuard",
    "EpochRun",
    "HFExport",
    "OfflineLogps",
    "RoundCheckpoint",
    "RoundProgress",
    "RoundRefresh",
    "RunReport",
    "RunStopped",
    "SampleTable",
    "StopOnSignal",
]
