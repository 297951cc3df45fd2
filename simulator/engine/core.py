"""Records of the compiled engine: cost, limits, requests, outcome, and everything that changes.

Arrays owned by the caller, so that a run can be cut at any time and resumed.
"""

from typing import Any, NamedTuple

from simulator.engine.block_runs import Cache
from simulator.engine.speculation import Spec
from simulator.engine.swap import Swap
from simulator.engine.tiers import Loads

# indices into State.ints
(
    STEP,
    STEP_ORIGIN,
    BATCH,
    KEYS_SUM,
    FREE_BLOCKS,
    HEAP_SIZE,
    N_RUNNING,
    FIRST,
    LAST,
    PARTIAL,
    N_PREEMPTED,
    N_FREE_SLOTS,
    FIFO_HEAD,
    FIFO_TAIL,
    NEXT_ROW,
    N_PENDING,
    KNOT,
    STEPS,
    DECODE_TOKENS,
    DECODE_KEYS,
    PREFILL_PAIRS,
    PREFILL_KEYS,
    CHUNKS,
    PREEMPTIONS,
    RECOMPUTED,
    SEGMENTS,
    MAX_RUNNING,
    MAX_WAITING,
    MAX_BLOCKS,
    WINDOW_SUM,
    N_GROWING,
    N_EVENTS,
    WINDOW_DECODE_KEYS,
    WINDOW_PAIRS,
    WINDOW_KEYS,
    STOP_ROW,
    N_LOADING,
    N_ADMITTED,
    RAN,
    OWNED,
    N_INTS,
) = range(41)
# indices into State.floats
(
    CLOCK,
    SHARE_W,
    SHARE_R0,
    SHARE_R1,
    IDLE,
    DECODE_ATTENTION,
    PREFILL_ATTENTION,
    RUNNING_INTEGRAL,
    WAITING_INTEGRAL,
    BLOCKS_INTEGRAL,
    ITL_MAX,
    INTERVAL,
    LAST_START,
    N_FLOATS,
) = range(14)
# rows of State.timeline
T_RUNNING, T_WAITING, T_BLOCKS, T_BUSY, T_PREEMPTIONS = range(5)

# columns of State.slots; ADMITTED is the number of the admission (where policies are), the last two list slots out of use, and the preempted ones, the last on top
(
    COMPUTED,
    JOINED,
    EMITTED,
    SEEN,
    FINISH_STEP,
    AFTER,
    BEFORE,
    EVENT_STEP,
    GROWING,
    ADMITTED,
    FREE_SLOT,
    PREEMPTED_SLOT,
    N_SLOT_COLUMNS,
) = range(13)
# columns of State.sums: the running sums when a sequence was last settled, and the time of its last token before a preemption
SETTLED_W, SETTLED_R0, SETTLED_R1, LAST_TOKEN, N_SUMS = range(5)
# rows of CostTable.head: the output head by logit rows, and what a key costs on top by decoding sequences
HEAD, WALK = range(2)
# columns of State.chunks
CHUNK_SLOT, CHUNK_SIZE, CHUNK_START, N_CHUNK_COLUMNS = range(4)

SLOT_BITS = 20
"""A finish key is step << SLOT_BITS | slot."""
REBASE_STEPS = 1 << 14
"""Running sums restart after this many steps, before the differences lose digits."""


class CostTable(NamedTuple):
    """Arrays of a StepCost; ``head`` [2, rows]: see ``HEAD`` and ``WALK``."""

    dense: Any
    head: Any
    knots: Any
    value: Any
    slope: Any
    seq: float
    planes: Any
    window: int
    window_chunked: bool
    window_slope: float


class Limits(NamedTuple):
    """EngineSettings, as numbers.

    Blocks of tokens come in ``groups``, of which ``windowed`` have a window and own ``windowed_most`` blocks each of one request at most (W4).
    """

    max_num_seqs: int
    budget: int
    block_size: int
    num_blocks: int
    max_model_len: int
    reserve_full: bool
    lookahead: int
    groups: int
    windowed: int
    window: int
    chunked: bool
    windowed_most: int


class Stream(NamedTuple):
    """Requests, as arrays; ``concurrency`` 0 is the open loop."""

    arrival: Any
    prompt: Any
    output: Any
    cached: Any
    max_tokens: Any
    concurrency: int


class Outcome(NamedTuple):
    """Per-request results, and histograms."""

    status: Any
    arrival: Any
    scheduled: Any
    first_token: Any
    finish: Any
    preemptions: Any
    busy: Any
    busy_prefill: Any
    busy_cached: Any
    recompute: Any
    steps_by_tokens: Any
    steps_by_rows: Any
    itl: Any


class State(NamedTuple):
    """Everything that changes, and survives a cut. Few arrays: the fewer there are, the sooner a function is compiled and called.

    ``residues`` are the blocks that the batch takes by step modulo block size; where windows are bounded, those it gives back and room for a sum follow.
    ``ints[RAN]``, ``ints[OWNED]``: who ran in the last step, and the blocks they owned, of whom and which some may be gone with its end. ``row``, ``slots``, ``sums`` [slots, …] are of running requests: see the columns' names; ``chunks`` lists those of the step being scheduled.
    """

    ints: Any
    floats: Any
    fifo: Any
    pending_time: Any
    pending_row: Any
    heap: Any
    residues: Any
    row: Any
    slots: Any
    sums: Any
    events: Any
    chunks: Any
    timeline: Any
    bits_f: Any
    bits_i: Any


class Extra(NamedTuple):
    """What goes beyond a plain replica: a record of arrays and flags for each feature.

    Where it is None every ``if extra is not None`` vanishes when Numba compiles; where it is not, all features are
    compiled in, and their flags switch them at run time.
    """

    cache: Cache
    spec: Spec
    swap: Swap
    loads: Loads


class Chunks(NamedTuple):
    """The tokens of a step: those of the decoding batch, and the chunks in ``State.chunks``.

    ``wanted``: the free blocks without which the first of the queue could not be admitted; 0 if it was not for them.
    """

    n: int
    tokens: int
    free: int
    preempted: bool
    wanted: int


class Price(NamedTuple):
    """What a step costs (R9), with the parts by which it is shared (R11)."""

    d0: float
    per_token: float
    per_row: float
    slope: float
    attention: float
    rows: int
    pairs: int
    keys: int
    seen_pairs: int
    seen_keys: int
    plane: int
    prefill: float
    per_chunk_token: float
