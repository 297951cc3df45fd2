"""Choices of a router: those that need no look at the replicas, made for all requests at once, and the rest as compiled code takes it."""

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import Requests
from simulator.errors import InputError
from simulator.fleet.records import Router
from simulator.randomness import uniform

Ints = NDArray[np.int64]


def assign(router: Router, requests: Requests, replicas: int, seed: int, *, cause: str = "router") -> Ints:
    """[n] replica of each request, by a router that knows nothing of the replicas (F2).

    Round robin: request i goes to i mod ``replicas``. Random: each is as likely. Hash: requests with one key go together
    (:func:`keys_of`).

    Raises
    ------
    InputError
        If the router looks at replicas, or requests have no key.
    """
    n = len(requests)
    if replicas == 1:
        return np.zeros(n, dtype=np.int64)
    if router.policy == "round-robin":
        return np.arange(n) % replicas
    if router.policy == "random":
        return random_replicas(seed, cause, n, replicas)
    if router.policy != "hash":
        raise InputError(f"router.policy = {router.policy!r}: looks at the replicas")
    return hashed(keys_of(requests, router.prefix_tokens), seed, replicas)


def random_replicas(seed: int, cause: str, n: int, replicas: int) -> Ints:
    """[n] replicas, each as likely as the others."""
    return np.minimum((uniform(seed, cause, 0, n) * replicas).astype(np.int64), replicas - 1)


def two_replicas(seed: int, cause: str, n: int, replicas: int) -> Ints:
    """[n, 2] two different replicas, every pair as likely as the others; twice the same one where there is but one."""
    first = random_replicas(seed, cause, n, replicas)
    if replicas == 1:
        return np.stack([first, first], axis=1)
    step = 1 + random_replicas(seed, f"{cause} second", n, replicas - 1)
    return np.stack([first, (first + step) % replicas], axis=1)


def keys_of(requests: Requests, prefix_tokens: int = 0) -> Ints:
    """[n] what a hash router keeps together: a tenant's requests, or those with the same prompt up to ``prefix_tokens`` and a block.

    Raises
    ------
    InputError
        If requests have neither tenants nor hashes.
    """
    if requests.tenant is not None:
        return requests.tenant
    if requests.hashes is None:
        raise InputError(
            "router.policy = 'hash': requests have nothing to go by; use clients.tenants, traffic.sessions, or a trace with hash_ids"
        )
    hashes = requests.hashes
    counts = np.diff(hashes.offsets)
    # Who has no block is a key of its own.
    keys = int(hashes.ids.max(initial=-1)) + 1 + np.arange(len(requests))
    place = hashes.offsets[:-1] + np.minimum(prefix_tokens // hashes.block_tokens, counts - 1)
    known = counts > 0
    keys[known] = hashes.ids[place[known]]
    return keys


def hashed(keys: Ints, seed: int, replicas: int) -> Ints:
    """[n] replica of each key: its bits mixed (SplitMix64), modulo ``replicas``."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z % np.uint64(replicas)).astype(np.int64)
