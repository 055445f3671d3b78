"""Seeded damage to bytes. Imports little: programs of their own use it."""

from __future__ import annotations

import numpy as np

NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def damaged(rng: np.random.Generator, data: bytes, first: int = 0, last: int | None = None) -> bytes:
    """One change between these bytes: a bit, a byte, a number of 8 bytes, a hole, a cut, something put in, a piece twice."""
    last = len(data) if last is None else last
    at = int(rng.integers(first, last))
    end = min(last, at + int(rng.integers(1, 600)))
    number = NUMBERS[int(rng.integers(len(NUMBERS)))].to_bytes(8, "little")
    changes = (
        lambda: data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :],
        lambda: data[:at] + rng.bytes(1) + data[at + 1 :],
        lambda: data[:at] + number + data[at + 8 :],
        lambda: data[:at] + bytes(end - at) + data[end:],
        lambda: data[:at],
        lambda: data[:at] + rng.bytes(int(rng.integers(1, 1100))) + data[at:],
        lambda: data[:end] + data[at:],
    )
    return changes[int(rng.integers(len(changes)))]()
