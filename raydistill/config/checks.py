"""Checks that the schemas share; each raises InvalidValue with the full key."""

from raydistill.errors import InvalidValue


def at_least(key: str, value: float, low: float) -> None:
    """Raise unless value >= low; NaN is refused."""
    if not value >= low:
        raise InvalidValue(key, value, f"at least {low}")


def positive(key: str, value: float) -> None:
    """Raise unless 0 < value < infinity."""
    if not 0.0 < value < float("inf"):
        raise InvalidValue(key, value, "a positive number")


def fraction(key: str, value: float) -> None:
    """Raise unless 0 <= value < 1."""
    if not 0.0 <= value < 1.0:
        raise InvalidValue(key, value, "in [0, 1)")


def clip_size(key: str, value: int) -> None:
    """Raise unless the small world can be drawn with frames so wide."""
    if value < 32 or value % 32:
        raise InvalidValue(key, value, "a multiple of 32")
