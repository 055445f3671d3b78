"""Philox4x32-10: a counter-based random generator, so that a draw is a pure function of its name.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The counter says *which* number is wanted
(a sample, an epoch, a view), the key is the seed. There is no state to save, to share or to restore.
"""

from __future__ import annotations

import numpy as np

from manyview.pipeline.compiled import njit

MASK = np.uint64(0xFFFFFFFF)
SHIFT = np.uint64(32)
M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


@njit(inline="always")
def philox(seed, a, b, c, d):
    """Four 32-bit numbers (as uint64) for the 64-bit key `seed` and the counter of four 32-bit words `(a, b, c, d)`."""
    x0, x1, x2, x3 = np.uint64(a) & MASK, np.uint64(b) & MASK, np.uint64(c) & MASK, np.uint64(d) & MASK
    k0, k1 = np.uint64(seed) & MASK, np.uint64(seed) >> SHIFT
    for _ in range(10):
        p0, p1 = M0 * x0, M1 * x2
        x0, x1, x2, x3 = (p1 >> SHIFT) ^ x1 ^ k0, p1 & MASK, (p0 >> SHIFT) ^ x3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return x0, x1, x2, x3


@njit(inline="always")
def uniform(x):
    """A float64 in [0, 1) from a 32-bit number."""
    return np.float64(x) * 2.0**-32


@njit(inline="always")
def below(x, n):
    """An integer in [0, n) from a 32-bit number, by multiplication (bias below n / 2**32)."""
    return np.int64((np.uint64(x) * np.uint64(n)) >> SHIFT)
