"""What the chips of a layout send each other: two-dimensional and gathered weights, and attention spread over sequences.

Per layer, with n tokens, X chips along d_model, R along the columns, g that gather, e bytes a value, heads of width H:

=============================  ======================================================================================
two-dimensional, a block       gather n·D/X over R before it, scatter as much after it
… its norm                     all-reduce over X of each token's statistics, FP32
… its feed-forward             scatter n·(gate and up)/R over X, gather n·F/R over X
… its attention                scatter n·(queries, keys, values)/R over X, gather n·N·H/R over X; keys and values on all X
gathered                       gather the stored shards of every matrix over g; gather and scatter (n/g)·D over R
attention over sequences       all-to-all over all chips of n·(queries, keys, values), and of n·N·H back
=============================  ======================================================================================

Where attention and feed-forward are parallel, their products are fused and so are their exchanges over X, and they share a
norm, as in the published code of [1]_ (``layers/two_d_parallel_xmap.py`` at commit 8d8a4f1b of google-research), from which
the order of the exchanges is taken. ``looped_exchange`` follows it in two more points: exchanges of the residual stream take
the R chips' axes one after the other, and those over X run in X pieces inside the products they belong to, so that all but
the first piece may hide.

A prefill in which chips hold parts of the keys gathers them, every layer. Its latencies add to its transfer, which makes a
step's time linear in its keys.

.. [1] R. Pope et al., "Efficiently Scaling Transformer Inference", 2022, §3.2–3.3 (as transcribed in the project's target tables).
"""

from dataclasses import replace

from simulator.catalog.architecture import FeedForward, Mixer, SoftmaxAttention
from simulator.catalog.slices import LinkDomain
from simulator.roofline.blocks import ffn_matrices, mixer_matrices
from simulator.roofline.collectives import all_gather_s, all_reduce_s, all_to_all_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernel_times import present
from simulator.roofline.kernels import Number, Op, all_reduce_ops, matrix_bytes
from simulator.roofline.layouts import AxisSplit, single_axes

STATISTICS_BYTES = 4
"""FP32 sum of squares of a token; layer norm has the sum as well."""


def layer_exchange_ops(d: Deployment, n: Number) -> list[Op]:
    """Exchanges of all layers for ``n`` tokens, those of attention over sequences and of keys apart."""
    pairs = [op for count, (mixer, ffn) in d.pairs for op in pair_exchange_ops(d, count, mixer, ffn, n)]
    return [*reduction_ops(d, d.reductions, n), *pairs]


def reduction_ops(d: Deployment, count: int, n: Number) -> list[Op]:
    """What ``count`` blocks exchange of the residual stream: an all-reduce each, or what a layout has in its place."""
    split = d.axis_split
    if split is None:
        return all_reduce_ops(d, "all-reduce, layers", count, n)
    rows = n * (d.architecture.d_model * d.precision.wide_bytes / (d.model_chips * d.gathered_chips))
    sums = STATISTICS_BYTES * (2 if d.architecture.norm == "layer" else 1)
    return [
        *_row_moves(d, count, rows, split.columns),
        *_all_reduces(d, "all-reduce, norms", count, n * sums, split.model),
    ]


def pair_exchange_ops(d: Deployment, count: int, mixer: Mixer | None, ffn: FeedForward | None, n: Number) -> list[Op]:
    """What ``count`` layers of a mixer and a feed-forward block exchange besides, in layouts that are not ``1d``."""
    split = d.axis_split
    if split is None:
        return []
    if split.layout.kind == "gathered":
        return _weight_gathers(d, count, mixer, ffn, n, split)
    wide = d.precision.wide_bytes
    ops, sizes = [], []  # columns scattered and gathered by one pair of exchanges
    if isinstance(mixer, SoftmaxAttention):
        width = mixer.n_heads * mixer.head_dim
        sizes.append((width * (2 if mixer.gated_output else 1), width))
        ops += _keys_moves(d, count, mixer, n, split)
    if ffn is not None:
        sizes.append((ffn.d_ff * (2 if ffn.gated else 1), ffn.d_ff))
    if d.architecture.parallel_attention_ffn and sizes:
        sizes = [(sum(out for out, _ in sizes), sum(back for _, back in sizes))]
    for out, back in sizes:
        for columns in (out, back):
            size = n * (columns / d.column_chips * wide)
            hides = 1 - 1 / d.model_chips if d.looped_exchange else 0.0
            moves = _moves(d, "gather, scatter columns", count, 1, size, split.model)
            ops += [replace(op, hides=hides) for op in moves]
    return ops


def sequence_exchange_ops(d: Deployment, count: int, mixer: Mixer, B: Number) -> list[Op]:
    """Queries of ``B`` decoding sequences to the chips that hold their keys, and outputs back; none unless ``batch``."""
    if d.kv_layout != "batch" or d.chips == 1 or not isinstance(mixer, SoftmaxAttention):
        return []
    ops = []
    keys = 2 * mixer.n_kv_heads if d.axis_split is None else 0  # two-dimensional layouts have them in place
    for heads in (mixer.n_heads + keys, mixer.n_heads):
        size = B * (heads * mixer.head_dim * d.precision.wide_bytes)
        time = count * all_to_all_s(size, d.slice.domains, link=d.eff.link)
        moved = size * (count * (d.chips - 1) / d.chips**2)
        ops.append(_collective(d, "all-to-all, attention", count, 1, size, moved, time))
    return ops


def keys_gather_ops(d: Deployment, count: int, mixer: Mixer, P: Number, K: Number, KW: Number) -> list[Op]:
    """Gathers of ``K`` keys (``KW`` in windowed layers) of ``P`` chunks, whose tokens or earlier keys are on other chips."""
    if not d.gathers_keys or not isinstance(mixer, SoftmaxAttention):
        return []
    split = d.axis_split
    domains = d.slice.domains if d.kv_layout == "batch" or split is None else (split.gathered,)
    chips = d.chips if d.kv_layout == "batch" else d.gathered_chips
    free = [replace(domain, latency_s=0.0) for domain in domains]
    per_byte = float(all_gather_s(1.0, free, link=d.eff.link))
    latency = float(all_gather_s(1.0, domains, link=d.eff.link)) + d.eff.collective_latency_s
    keys = K if mixer.window is None else KW
    size = keys * (count * d.attended_kv_heads(mixer) * d.precision.kv_head_bytes(mixer.head_dim))
    time = size * per_byte
    return [
        Op(
            "all-gather, keys",
            "collective",
            count,
            comm_bytes=size * (1 - 1 / chips),
            network_s=time,
            roofline_s=time,
            overhead_s=P * (count * latency),
        )
    ]


def _row_moves(d: Deployment, count: int, rows: Number, columns: LinkDomain) -> list[Op]:
    """Gathers of the residual stream over the columns' axes before ``count`` blocks, and scatters after them."""
    ops, size = [], rows
    for axis in reversed(single_axes(columns)) if d.looped_exchange else [columns]:
        ops += _moves(d, "gather, scatter d_model", count, 2, size, axis)
        size = size * (1 / axis.size)
    return ops


def _keys_moves(d: Deployment, count: int, a: SoftmaxAttention, n: Number, split: AxisSplit) -> list[Op]:
    """Keys and values of partial sums over d_model: all of them to every chip, or each sequence's to its own."""
    size = n * (2 * d.projected_kv_heads(a) * a.head_dim * d.precision.wide_bytes)
    if d.kv_layout == "batch":
        return _moves(d, "scatter, keys", count, 1, size * (1 / d.column_chips), split.model)
    return _all_reduces(d, "all-reduce, keys", count, size, split.model)


def _weight_gathers(
    d: Deployment, count: int, mixer: Mixer | None, ffn: FeedForward | None, n: Number, split: AxisSplit
) -> list[Op]:
    """Every matrix of ``count`` layers, put together from the shards of the chips that split the tokens."""
    matrices = [] if mixer is None else [(1.0, m) for m in mixer_matrices(d, mixer).values()]
    matrices += [] if ffn is None else ffn_matrices(d, ffn).values()
    some = present(n)
    return [
        op
        for each, m in matrices
        for op in _moves(
            d, "all-gather, weights", int(count * each), 1, some * matrix_bytes(d.precision, m), split.gathered
        )
    ]


def _moves(d: Deployment, name: str, count: int, passes: int, size: Number, domain: LinkDomain) -> list[Op]:
    """``count`` times ``passes`` all-gathers, or reduce-scatters, which take as long, of ``size`` bytes; none over one chip."""
    if domain.size == 1:
        return []
    time = count * passes * all_gather_s(size, [domain], link=d.eff.link)
    moved = size * (count * passes * (1 - 1 / domain.size))
    return [_collective(d, name, count, passes, size, moved, time)]


def _all_reduces(d: Deployment, name: str, count: int, size: Number, domain: LinkDomain) -> list[Op]:
    if domain.size == 1:
        return []
    time = count * all_reduce_s(size, [domain], link=d.eff.link)
    return [_collective(d, name, count, 1, size, size * (count * 2 * (1 - 1 / domain.size)), time)]


def _collective(d: Deployment, name: str, count: int, passes: int, size: Number, moved: Number, time: Number) -> Op:
    return Op(
        name,
        "collective",
        count * passes,
        comm_bytes=moved,
        network_s=time,
        roofline_s=time,
        overhead_s=present(size) * (count * passes * d.eff.collective_latency_s),
    )
