"""Numbers as text, with as many decimals as their spread needs."""

import math


def decimals_for(spread: float, default: int = 3) -> int:
    """Decimals that show two digits of a spread: at least `default`, at most 12.

    Args:
        spread: A standard deviation or error, or a difference; 0 if it is not known.
        default: Decimals of a spread near 1, and where it is 0 or not finite.
    """
    if not math.isfinite(spread) or spread <= 0:
        return default
    return min(12, max(default, 1 - math.floor(math.log10(spread))))


def is_negligible(value: float, *scale: float) -> bool:
    """Whether a value is rounding beside the numbers that it was computed from."""
    return abs(value) <= 1e-9 * max((abs(number) for number in scale), default=0.0)
