"""One policy for attempts that fail: what is tried again, how often, and when."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf_pl.utils.errors import InputError, at_least, finite

RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # HTTP statuses that may be different a moment later
MAX_RETRY_AFTER_S = 60.0  # of what a service asks for


@dataclass(frozen=True)
class Retries:
    """Further attempts after a failure.

    Args:
        count: Their largest number.
        backoff_s: Pause before the first of them, seconds; doubled before every further one.
    """

    count: int
    backoff_s: float

    def pauses(self) -> Iterator[float]:
        """The pause before each further attempt, seconds."""
        return (self.backoff_s * 2**number for number in range(self.count))

    def pause(self, failures: int, asked_s: float = 0.0) -> float | None:
        """The pause before the next attempt, seconds; None if there is none.

        Args:
            failures: Attempts that have failed, 1 or more.
            asked_s: What the service asks for, seconds (see `retry_after`); 60 of them are granted at most.
        """
        if failures > self.count:
            return None
        return max(self.backoff_s * 2 ** (failures - 1), min(asked_s, MAX_RETRY_AFTER_S))


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a `Retry-After` header asks for; 0 without one, or for a date."""
    asked = headers.get("retry-after", "")
    return float(asked) if asked.isascii() and asked.isdigit() else 0.0


def check_requests(group: str, concurrency: int, timeout_s: float, retries: int, backoff_s: float) -> Retries:
    """The retries of requests, once their options are seen to make sense.

    Raises:
        InputError: Names the option in `group` that does not.
    """
    at_least(group, concurrency=(concurrency, 1), retries=(retries, 0), backoff_s=(backoff_s, 0))
    finite(group, timeout_s=timeout_s)
    if not timeout_s > 0:
        raise InputError(f"`{group}.timeout_s` must be above 0 seconds, got {timeout_s}.")
    return Retries(retries, backoff_s)
