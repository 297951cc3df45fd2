"""Step times of the parts of a deployment, put together from those of single layers.

What a step takes in a layer depends on the chips and on the step, not on the layers beside it, so the time of any
pipeline stage counts its layers and adds their times up. A search over shardings asks for many stages of few kinds of layer.
"""

from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

from simulator.catalog.architecture import DenseFFN, FeedForward, Mixer
from simulator.roofline.blocks import ffn_ops, mixer_ops, mixer_vectors
from simulator.roofline.compile import hidden_s, hiding, sum_over
from simulator.roofline.deployment import Deployment, Part
from simulator.roofline.exchange import pair_exchange_ops, reduction_ops
from simulator.roofline.kernels import Op
from simulator.roofline.ops import (
    StepShape,
    attention_ops,
    check_windows,
    context_gather_ops,
    embedding_ops,
    head_ops,
    norm_op,
    overhead_op,
)


class _Seconds(NamedTuple):
    """Time of some ops, of the products among them, of what collectives among them may hide, and the largest part of one that may."""

    all_s: float
    products_s: float = 0.0
    able_s: float = 0.0
    fraction: float = 0.0


_Common = dict[StepShape, tuple[list[_Seconds], dict[FeedForward, _Seconds], list[_Seconds]]]
"""Per step, times of the mixers, of the dense feed-forward blocks, and of :func:`_rest`."""


class StepTimes:
    """Times of steps in any part of a deployment; a layer is priced once for a step, however many parts have it.

    ``like`` is of a deployment that differs in nothing but where its experts are.
    """

    def __init__(self, d: Deployment, *, like: "StepTimes | None" = None) -> None:
        self._d = d
        self._known: dict[StepShape, tuple[list[float], ...]] = {}
        self.common: _Common = like.common if like else {}

    def step_time_s(self, part: Part, step: StepShape) -> float:
        """Time of one step: what :func:`~simulator.roofline.compile.step_time_s` finds op by op for a stage like that. [s]"""
        if step not in self._known:
            self._known[step] = tuple(map(list, zip(*self._price(step), strict=True)))
        all_s, products_s, able_s, fractions = self._known[step]
        counts = (*part.mixers, *part.ffns, *part.pairs, part.norms, part.reductions, part.first, part.last, 1)
        time_s: float = sum(map(mul, counts, all_s))
        if any(fractions):  # as in hidden_s, all of a part's products hide all of its collectives
            most = max(fraction for fraction, count in zip(fractions, counts, strict=True) if count)
            time_s -= min(sum(map(mul, counts, able_s)), most * sum(map(mul, counts, products_s)))
        return time_s

    def _price(self, step: StepShape) -> list[_Seconds]:
        """Of a layer of each mixer and of each feed-forward block, and then what :func:`_rest` lists."""
        d, n = self._d, step.n
        if step not in self.common:
            check_windows(d, step)
            mixers = [_mixer(d, mixer, step) for _, mixer in d.mixers]
            dense: dict[FeedForward, _Seconds]
            dense = {ffn: _seconds(d, ffn_ops(d, 1, ffn, n)) for _, ffn in d.ffns if isinstance(ffn, DenseFFN)}
            self.common[step] = mixers, dense, _rest(d, step)
        mixers, dense, rest = self.common[step]
        return [*mixers, *(dense.get(ffn) or _seconds(d, ffn_ops(d, 1, ffn, n)) for _, ffn in d.ffns), *rest]


def _mixer(d: Deployment, mixer: Mixer, step: StepShape) -> _Seconds:
    dense = [*mixer_ops(d, 1, mixer, step.n), norm_op(d, 0, step.n, *mixer_vectors(d, mixer))]
    return _seconds(d, dense, attention_ops(d, 1, mixer, step))


def _rest(d: Deployment, step: StepShape) -> list[_Seconds]:
    """Of the exchanges of each pair of blocks, a norm, a reduction, the embedding, the head, and of what every part does once."""
    n = step.n
    head = head_ops(d, step.R) if step.R else []
    head_s = float(sum_over(op.time_s for op in head) - hidden_s(d, head))
    return [
        *(_seconds(d, pair_exchange_ops(d, 1, mixer, ffn, n)) for _, (mixer, ffn) in d.pairs),
        _seconds(d, [norm_op(d, 1, n)]),
        _seconds(d, reduction_ops(d, 1, n)),
        _seconds(d, embedding_ops(d, n)),
        _Seconds(head_s),  # its collectives hide behind its own product alone
        _seconds(d, [overhead_op(d, n)], context_gather_ops(d, step.K, step.KW) if step.P else []),
    ]


def _seconds(d: Deployment, dense: Sequence[Op], attention: Sequence[Op] = ()) -> _Seconds:
    """Time of some ops, of which the ``attention`` hides nothing and is not hidden."""
    all_s = products_s = able_s = most = 0.0
    for op in dense:
        all_s += float(op.time_s)
        if op.kind == "matmul":
            products_s += float(op.roofline_s)
        elif op.kind == "collective":
            fraction = hiding(d, op)
            able_s += fraction * float(op.roofline_s)
            most = max(most, fraction)
    return _Seconds(all_s + sum(float(op.time_s) for op in attention), products_s, able_s, most)
