"""Sizes as Triton wants them."""


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is no less than ``number`` (at least 1)."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """How many times ``divisor`` it takes to hold ``number``."""
    return -(-number // divisor)
