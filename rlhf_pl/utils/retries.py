"""The retry policy of HTTP requests and rewards: which failures are retried, how often, and when."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf_pl.utils.errors import InputError, check_at_least, check_finite

RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # HTTP statuses of temporary failures
MAX_RETRY_AFTER_S = 60.0  # longest pause that a service may request


@dataclass(frozen=True)
class Retries:
    """Retries after a failure.

    Args:
        count: Maximum number.
        backoff_s: Pause before the first retry, seconds; doubled before each further one.
    """

    count: int
    backoff_s: float

    def pauses(self) -> Iterator[float]:
        """The pause before each retry, seconds."""
        return (self.backoff_s * 2**number for number in range(self.count))

    def pause(self, failures: int, requested_s: float = 0.0) -> float | None:
        """The pause before the next retry, seconds; None if there is none left.

        Args:
            failures: Failed attempts, 1 or more.
            requested_s: Pause that the service requests (see `retry_after`), seconds; at most 60 count.
        """
        if failures > self.count:
            return None
        return max(self.backoff_s * 2 ** (failures - 1), min(requested_s, MAX_RETRY_AFTER_S))


def retry_after(headers: Mapping[str, str]) -> float:
    """The pause that a `Retry-After` header requests, seconds; 0 without the header, or for a date."""
    requested = headers.get("retry-after", "")
    return float(requested) if requested.isascii() and requested.isdigit() else 0.0


def check_requests(group: str, concurrency: int, timeout_s: float, retries: int, backoff_s: float) -> Retries:
    """Check the options of requests. Returns their retries.

    Raises:
        InputError: An option is out of range. The message names it in `group`.
    """
    check_at_least(group, concurrency=(concurrency, 1), retries=(retries, 0), backoff_s=(backoff_s, 0))
    check_finite(group, timeout_s=timeout_s)
    if not timeout_s > 0:
        raise InputError(f"`{group}.timeout_s` must be above 0 seconds, got {timeout_s}.")
    return Retries(retries, backoff_s)
