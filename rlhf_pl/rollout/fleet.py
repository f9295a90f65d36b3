"""Servers that draw answers together, of which some may be lost for a time."""

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
    """Which servers are there, and why the others are not.

    Args:
        engines: All servers.
        retries: Further attempts to reach one before it is given up.
    """

    def __init__(self, engines: Sequence[ServedEngine], retries: Retries) -> None:
        self.engines, self.retries = list(engines), retries
        self.quiet = False  # of several ranks one tells
        self._lost: dict[str, Exception] = {}

    @property
    def there(self) -> list[ServedEngine]:
        """The servers in use."""
        return [engine for engine in self.engines if engine.url not in self._lost]

    @property
    def lost(self) -> dict[str, str]:
        """Why the servers that are not in use are not, by URL."""
        return {url: str(reason) for url, reason in self._lost.items()}

    @lost.setter
    def lost(self, reasons: dict[str, str]) -> None:
        self._lost = {url: InputError(reason) for url, reason in reasons.items()}

    def lose(self, engines: Sequence[ServedEngine], reason: Exception) -> None:
        """Go on without servers."""
        news = [engine.url for engine in engines if engine.url not in self._lost]
        self._lost |= {engine.url: reason for engine in engines}
        if news and self.there and not self.quiet:
            said = f"{' and '.join(news)} draws no answers until it is back; the other servers do its share."
            console.print(f"{said} {_reason(reason)}", soft_wrap=True)

    def take_back(self, engines: Sequence[ServedEngine]) -> None:
        """Servers that were lost, or not, can be used."""
        for engine in engines:
            if self._lost.pop(engine.url, None) is not None and not self.quiet:
                console.print(f"{engine.url} is back.", soft_wrap=True)

    def of_those_there(self, action: Callable[[ServedEngine], T]) -> list[tuple[ServedEngine, T]]:
        """What an action gives for each server in use; one that can't be reached is lost.

        Raises:
            InputError: None can be reached, or the action raises it.
        """
        found = []
        for engine in self.there:
            try:
                found.append((engine, action(engine)))
            except ServerError as error:
                if error.status is not None:
                    raise
                self.lose([engine], error)
        self.require_one()
        return found

    def require_one(self) -> None:
        """Raise an error if no server is left."""
        reasons = list(self._lost.values())
        if self.there:
            return
        if len(reasons) > 1:
            said = " ".join(dict.fromkeys(map(_reason, reasons)))
            raise InputError(
                f"`rollout.sampler.urls`: none of the {len(reasons)} servers is left. {said} What was drawn is kept: "
                "start them, and run the same command again."
            )
        raise reasons[0]

    def problem(
        self, engine: ServedEngine, version: str, failure: Exception | None, known: Callable[[], bool]
    ) -> Exception | None:
        """Why a server has to be given up: it has other weights, or can't be reached any more. None if it need not.

        Args:
            engine: The server.
            version: Of the weights that it must have.
            failure: What a request to it ended with; None if with answers.
            known: Whether it was found lost in the meantime.
        """
        error = failure
        reached = not isinstance(failure, ServerError) or failure.status is not None
        for pause in chain([0.0] if reached else [], self.retries.pauses()):
            if error is not None and known():
                break
            time.sleep(pause)
            try:
                held = engine.weight_version()
            except ServerError as again:
                error = again
                continue
            if held == version:
                return None
            return StaleSamplerError(
                f"The server at {engine.url} does not hold the policy's weights: it was started anew, or given others. "
                "Run the same command again to go on."
            )
        return error


def _reason(error: Exception) -> str:
    return str(error).removeprefix("`rollout.sampler`: ").removesuffix(" Run the same command again to go on.")
