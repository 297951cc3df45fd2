"""Counter-based random numbers: a value is a function of (seed, cause, index) and of nothing else.

Values are drawn in fixed blocks of :data:`BLOCK` indices. Block ``b`` of a cause comes from its own Philox
generator keyed by (seed, cause), with ``b`` in the counter [1]_, so neither the order in which values are asked
for, nor how the work is split, nor another cause added later can change them.

.. [1] J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, doi:10.1145/2063384.2063405.
"""

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096


def generator(seed: int, cause: str, block: int) -> np.random.Generator:
    """Return the generator of one block of one cause."""
    digest = hashlib.blake2b(f"{seed}/{cause}".encode(), digest_size=16).digest()
    key = np.frombuffer(digest, dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, block], dtype=np.uint64)))


def draw(
    seed: int,
    cause: str,
    start: int,
    stop: int,
    sample: Callable[[np.random.Generator, int], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Values ``start``…``stop`` (exclusive) of ``cause``, as ``sample(generator, BLOCK)`` draws them per block.

    ``sample`` is always called for whole blocks; the slice is cut afterwards.
    """
    if stop <= start:
        return np.empty(0)
    blocks = range(start // BLOCK, (stop - 1) // BLOCK + 1)
    values = np.concatenate([sample(generator(seed, cause, b), BLOCK) for b in blocks])
    offset = start - blocks[0] * BLOCK
    return values[offset : offset + stop - start]


def uniform(seed: int, cause: str, start: int, stop: int) -> NDArray[np.float64]:
    """Uniform values in [0, 1), one per index."""
    return draw(seed, cause, start, stop, lambda rng, n: rng.random(n))


def normal(seed: int, cause: str, start: int, stop: int) -> NDArray[np.float64]:
    """Standard normal values, one per index."""
    return draw(seed, cause, start, stop, lambda rng, n: rng.standard_normal(n))


def stratified(seed: int, cause: str, n: int) -> NDArray[np.float64]:
    """``n`` uniform values in (0, 1), one in each of ``n`` equal strata, in random order: a Latin hypercube's column [2]_.

    Quantiles of a figure over few draws scatter far less than over independent ones. The values belong to ``n`` as well as to
    seed and cause: a longer list does not begin with a shorter one.

    .. [2] M. McKay, R. Beckman, W. Conover, Technometrics 21(2), 1979, doi:10.1080/00401706.1979.10489755: recalled.

    >>> sorted((stratified(1, "test", 4) * 4).astype(int).tolist())
    [0, 1, 2, 3]
    """
    order = np.argsort(np.argsort(uniform(seed, f"{cause}/stratum/{n}", 0, n), kind="stable"), kind="stable")
    inside = uniform(seed, f"{cause}/inside/{n}", 0, n)
    return np.asarray((order + np.clip(inside, 1e-9, 1 - 1e-9)) / n)
