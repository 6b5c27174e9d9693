"""Counter-based random numbers: a function of (seed, position), of no state and no batch.

SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) used
as a hash: the seed is mixed once and selects a stream, the position is the counter in it. The
values are frozen by a test, for a resumed generation must draw the numbers that it would have
drawn anyway, whatever version resumes it.
"""

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in ``[0, 1)`` with 53 random bits; ``seed`` counts modulo 2**64."""
    stream = _mix((seed + _GAMMA) & _MASK)
    return (_mix((stream + (position + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53
