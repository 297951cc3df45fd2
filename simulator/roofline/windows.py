"""Keys seen through an attention window: sums of w(t) in closed form, for numbers and arrays alike.

w(t), the keys a query at context t (itself included) sees, is min(t, W) in a sliding window and ((t − 1) mod W) + 1
in a chunked one, as in :mod:`simulator.roofline.step_cost`. Without a window (W = 0) every sum is 0.
"""

from typing import Any

import numpy as np


def seen_keys(context: Any, window: int, *, chunked: bool) -> Any:
    """w(t) of queries at ``context``; fractions of a token are let through.

    >>> [float(seen_keys(t, 4, chunked=c)) for c in (False, True) for t in (1, 4, 5)]
    [1.0, 4.0, 4.0, 1.0, 4.0, 1.0]
    """
    if window == 0:
        return np.multiply(context, 0)
    return np.mod(np.subtract(context, 1), window) + 1 if chunked else np.minimum(context, window)


def window_pairs(past: Any, tokens: Any, window: int, *, chunked: bool) -> Any:
    """AW of a chunk of ``tokens`` on ``past`` earlier ones: w(past + 1) + … + w(past + tokens).

    >>> int(window_pairs(3, 3, 4, chunked=False)), int(window_pairs(3, 3, 4, chunked=True))
    (12, 7)
    """
    return _pairs_up_to(np.add(past, tokens), window, chunked=chunked) - _pairs_up_to(past, window, chunked=chunked)


def window_keys_read(past: Any, tokens: Any, window: int, *, chunked: bool) -> Any:
    """KW of such a chunk: keys its windowed layers read.

    >>> int(window_keys_read(10, 3, 4, chunked=False)), int(window_keys_read(10, 3, 4, chunked=True))
    (6, 5)
    """
    if window == 0:
        return np.multiply(past, 0)
    if chunked:
        return np.mod(past, window) + tokens
    return np.minimum(np.add(past, tokens), np.add(tokens, window - 1))


def _pairs_up_to(context: Any, window: int, *, chunked: bool) -> Any:
    """w(1) + … + w(context)."""
    if window == 0:
        return np.multiply(context, 0)
    if chunked:
        whole, rest = np.divmod(context, window)
        return whole * (window * (window + 1) // 2) + rest * (rest + 1) // 2
    inside = np.minimum(context, window)
    return inside * (inside + 1) // 2 + (context - inside) * window
