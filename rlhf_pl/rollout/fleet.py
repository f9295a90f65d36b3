"""Servers that share the sampling of a round; some may be unavailable for a time."""

import time
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

from rlhf_pl.rollout.served_engine import ServedEngine, ServerError
from rlhf_pl.rollout.weight_sync.self_check import StaleSamplerError
from rlhf_pl.utils.console import console
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.retries import Retries

T = TypeVar("T")


class Fleet:
    """Tracks which servers are available, and why the others are not.

    Args:
        engines: All servers.
        retries: Further attempts to reach a server before it counts as lost.
    """

    def __init__(self, engines: Sequence[ServedEngine], retries: Retries) -> None:
        self.engines, self.retries = list(engines), retries
        self.quiet = False  # only rank 0 prints messages
        self._lost: dict[str, Exception] = {}

    @property
    def available(self) -> list[ServedEngine]:
        """The servers in use."""
        return [engine for engine in self.engines if engine.url not in self._lost]

    @property
    def lost(self) -> dict[str, str]:
        """Why each lost server is unavailable, by URL."""
        return {url: str(reason) for url, reason in self._lost.items()}

    @lost.setter
    def lost(self, reasons: dict[str, str]) -> None:
        self._lost = {url: InputError(reason) for url, reason in reasons.items()}

    def mark_lost(self, engines: Sequence[ServedEngine], reason: Exception) -> None:
        """Record that servers are unavailable; the run continues with the others."""
        newly_lost = [engine.url for engine in engines if engine.url not in self._lost]
        self._lost |= {engine.url: reason for engine in engines}
        if newly_lost and self.available and not self.quiet:
            notice = (
                f"{' and '.join(newly_lost)} samples no responses until it is back; the other servers do its share."
            )
            console.print(f"{notice} {_shorten_reason(reason)}", soft_wrap=True)

    def restore(self, engines: Sequence[ServedEngine]) -> None:
        """Record that servers can be used (again)."""
        for engine in engines:
            if self._lost.pop(engine.url, None) is not None and not self.quiet:
                console.print(f"{engine.url} is back.", soft_wrap=True)

    def call_available(self, action: Callable[[ServedEngine], T]) -> list[tuple[ServedEngine, T]]:
        """The result of an action for each available server; a server that can't be reached is lost.

        Raises:
            InputError: No server can be reached, or the action raises it.
        """
        results = []
        for engine in self.available:
            try:
                results.append((engine, action(engine)))
            except ServerError as error:
                if error.status is not None:
                    raise
                self.mark_lost([engine], error)
        self.require_available()
        return results

    def require_available(self) -> None:
        """Raise InputError if no server is left."""
        reasons = list(self._lost.values())
        if self.available:
            return
        if len(reasons) > 1:
            causes = " ".join(dict.fromkeys(map(_shorten_reason, reasons)))
            raise InputError(
                f"`rollout.sampler.urls`: none of the {len(reasons)} servers is left. {causes} Sampled responses are "
                "kept: start the servers, and run the same command again."
            )
        raise reasons[0]

    def find_problem(
        self, engine: ServedEngine, version: str, failure: Exception | None, is_known_lost: Callable[[], bool]
    ) -> Exception | None:
        """Why a server can't be used any more: it has other weights, or can't be reached. None if it can be used.

        Args:
            engine: The server.
            version: The version of the weights that it must have.
            failure: The error of the last request to it; None if that succeeded.
            is_known_lost: Whether another thread has found the server lost in the meantime.
        """
        error = failure
        is_reachable = not isinstance(failure, ServerError) or failure.status is not None
        for pause in chain([0.0] if is_reachable else [], self.retries.pauses()):
            if error is not None and is_known_lost():
                break
            time.sleep(pause)
            try:
                current = engine.get_weight_version()
            except ServerError as failed_query:
                error = failed_query
                continue
            if current == version:
                return None
            return StaleSamplerError(
                f"The server at {engine.url} does not have the policy's weights: it was restarted, or got others. "
                "Run the same command again to continue."
            )
        return error


def _shorten_reason(error: Exception) -> str:
    return str(error).removeprefix("`rollout.sampler`: ").removesuffix(" Run the same command again to continue.")
