"""A replica that sees its requests block by block, and forgets those that are done: constant memory however long the stream.

The core knows rows of one frame. Between blocks the frame is renewed in Python: rows that are finished or rejected go to the
caller, the others (running, preempted, waiting, sent by a client but not yet there) move to the front in their order, the
next block is appended, and the few places of the state that name rows are renumbered. Order among rows is kept, so ties are
broken as in one long stream; everything else in the state names slots and steps, and stays.

The run is cut (rule I9: a cut changes nothing) at every :data:`CUT_ROWS`-th row, never at the end of a block: wherever
blocks end, the same float operations happen, and the same figures come out to the last bit.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.engine import core
from simulator.engine.records import FINISHED, NOT_ARRIVED, REJECTED, EngineResult, EngineSettings, Requests
from simulator.engine.single import Engine
from simulator.errors import InputError
from simulator.roofline.step_cost import StepCost

CUT_ROWS = 4096
"""Rows between cuts: a call costs some 20 µs, a thousandth of the work between two."""


#: Settings that may be anything; the others must be at their defaults.
PLAIN_SETTINGS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_kv_blocks",
    "max_model_len",
    "scheduler_reserve_full_isl",
    "kv_groups",
)


def _demand_plain(settings: EngineSettings) -> None:
    plain = EngineSettings()
    for field in fields(settings):
        value, default = getattr(settings, field.name), getattr(plain, field.name)
        if field.name not in PLAIN_SETTINGS and value != default:
            raise InputError(
                f"engine.{field.name} = {value!r}: a run in blocks knows only the plain replica, {default!r}; "
                "keep the requests (summary_only = false)"
            )


class Retired(NamedTuple):
    """Requests that are done, in stream order within one batch. [n] each; names as in ``Requests`` and ``EngineResult``.

    ``row`` is the index in the whole stream of this replica.
    """

    row: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    status: NDArray[np.int8]
    arrival_s: NDArray[np.float64]
    scheduled_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    preemptions: NDArray[np.int32]
    busy_s: NDArray[np.float64]
    busy_prefill_s: NDArray[np.float64]
    busy_cached_s: NDArray[np.float64]
    recompute_s: NDArray[np.float64]


class StreamingEngine(Engine):
    """One replica fed block by block.

    Parameters
    ----------
    cost, settings, timeline_interval_s
        as for :class:`simulator.engine.single.Engine`; None starts with the shortest intervals. The settings must be
        those of a plain replica (:data:`PLAIN_SETTINGS`): what others remember of past requests is not carried over.
    consume
        called with the requests that are done, before their rows are dropped.
    concurrency
        clients of a closed loop; 0: open loop. ``arrival_s`` of the blocks then means think times.
    itl_window_s
        open loop: :attr:`itl_counts_measured` counts the steps that start in this stretch of time. [s]
    """

    def __init__(
        self,
        cost: StepCost,
        settings: EngineSettings,
        consume: Callable[[Retired], None],
        *,
        concurrency: int = 0,
        timeline_interval_s: float | None = None,
        itl_window_s: tuple[float, float] | None = None,
        cut_rows: int = CUT_ROWS,
    ) -> None:
        if cut_rows < 1:
            raise InputError(f"cut_rows = {cut_rows}: must be at least 1")
        _demand_plain(settings)
        nothing = np.zeros(0, dtype=np.int64)
        none = Requests(np.zeros(0), nothing, nothing, nothing, nothing)
        super().__init__(cost, settings, none, timeline_interval_s=timeline_interval_s)
        self._settings = settings
        self._consume = consume
        self._concurrency = concurrency
        self._cut_rows = cut_rows
        self._stream = self._stream._replace(concurrency=concurrency)
        self._state = self._state._replace(
            pending_time=np.zeros(concurrency + 1), pending_row=np.zeros(concurrency + 1, dtype=np.int64)
        )
        self._row = nothing
        self._accepted = np.zeros(0, dtype=bool)
        self._fed = 0
        self._cut = cut_rows
        self._last_arrival_s = 0.0
        self._edges_s = list(itl_window_s or ())
        self._itl_at_edges: list[NDArray[np.int64]] = []
        self.largest_frame = 0

    @property
    def live_rows(self) -> int:
        """Rows the replica cannot forget yet: fed, and not done."""
        return int((~self._done()).sum())

    def feed(self, block: Requests) -> None:
        """Append the next requests of the stream and run as far as they allow.

        ``block.arrival_s`` goes on from the last block's (open loop), and ``block.concurrency`` is the stream's. The last requests stay unserved until more are fed or
        :meth:`finish` is called: what comes after them decides how their steps are cut.

        Raises
        ------
        InputError
            If an open-loop block starts before the last one ended, or ``concurrency`` is another one.
        """
        if block.concurrency != self._concurrency:
            raise InputError(f"requests.concurrency = {block.concurrency}, but the stream's is {self._concurrency}")
        if len(block) == 0:
            return
        if not self._concurrency:
            if block.arrival_s[0] < self._last_arrival_s:
                raise InputError(
                    f"requests.arrival_s[{self._fed}] = {block.arrival_s[0]}: is earlier than the block before it"
                )
            self._last_arrival_s = float(block.arrival_s[-1])
        self._renew(block)
        if self._concurrency:
            self._run_closed(ended=False)
        else:
            arrival = self._stream.arrival
            first = self._fed - len(arrival)
            while self._cut < self._fed:
                self._run_to(float(arrival[self._cut - first]))
                self._cut += self._cut_rows

    def finish(self) -> EngineResult:
        """Serve what is left; return the replica's result, whose per-request columns are empty."""
        if self._concurrency:
            self._run_closed(ended=True)
        self._run_to(math.inf)
        nothing = np.zeros(0, dtype=np.int64)
        self._renew(Requests(np.zeros(0), nothing, nothing, nothing, nothing))
        return self.result()

    @property
    def itl_counts_measured(self) -> NDArray[np.int64] | None:
        """Inter-token latencies of the steps that started inside ``itl_window_s``, once the run is past it."""
        if len(self._itl_at_edges) < 2:
            return None
        return np.asarray(self._itl_at_edges[1] - self._itl_at_edges[0])

    def _run_to(self, until_s: float) -> None:
        while self._edges_s and self._edges_s[0] <= until_s:
            self.advance(self._edges_s.pop(0))
            self._itl_at_edges.append(self._out.itl.copy())
        self.advance(until_s)

    def _run_closed(self, *, ended: bool) -> None:
        """Run a closed loop from cut to cut, as long as it cannot want a row that is not there yet."""
        ints = self._state.ints
        # Between two looks at the cut at most a full batch finishes; each finish, and each client under way, takes
        # one row that is accepted and any number of rejected ones before it.
        reserve = self._settings.max_num_seqs + self._concurrency + 1
        accepted = np.append(0, np.cumsum(self._accepted))
        first = self._fed - len(self._row)
        while self._cut < self._fed:
            # Rows from the cut on are the frame's last, unless some of them are done; then the replica is past it.
            local = max(self._cut - first, 0)
            if not ended and accepted[-1] - accepted[local] < reserve:
                return
            ints[core.STOP_ROW] = local
            self.advance(math.inf)
            self._cut += self._cut_rows
        ints[core.STOP_ROW] = np.iinfo(np.int64).max

    def _renew(self, block: Requests) -> None:
        """Hand over the rows that are done, move the others to the front, append ``block``."""
        stream, out, state = self._stream, self._out, self._state
        done = self._done()
        if done.any():
            self._consume(
                Retired(
                    self._row[done],
                    stream.prompt[done],
                    stream.output[done],
                    stream.cached[done],
                    out.status[done],
                    out.arrival[done],
                    out.scheduled[done],
                    out.first_token[done],
                    out.finish[done],
                    out.preemptions[done],
                    out.busy[done],
                    out.busy_prefill[done],
                    out.busy_cached[done],
                    out.recompute[done],
                )
            )
        keep = ~done
        n_old, n_new = int(keep.sum()), len(block)

        def longer(column: NDArray[Any], tail: Any) -> NDArray[Any]:
            joined = np.empty(n_old + n_new, dtype=column.dtype)
            joined[:n_old] = column[keep]
            joined[n_old:] = tail
            return joined

        closed = self._concurrency > 0
        self._stream = stream._replace(
            arrival=longer(stream.arrival, block.arrival_s),
            prompt=longer(stream.prompt, block.prompt_tokens),
            output=longer(stream.output, block.output_tokens),
            cached=longer(stream.cached, block.cached_tokens),
            max_tokens=longer(stream.max_tokens, block.max_tokens),
        )
        self._out = out._replace(
            status=longer(out.status, NOT_ARRIVED),
            arrival=longer(out.arrival, np.nan if closed else block.arrival_s),
            **{name: longer(getattr(out, name), np.nan) for name in ("scheduled", "first_token", "finish")},
            **{
                name: longer(getattr(out, name), 0)
                for name in ("preemptions", "busy", "busy_prefill", "busy_cached", "recompute")
            },
        )
        place = np.cumsum(keep) - 1
        ints = state.ints
        head, tail, pending = ints[core.FIFO_HEAD], ints[core.FIFO_TAIL], ints[core.N_PENDING]
        fifo = np.zeros(n_old + n_new, dtype=np.int64)
        fifo[: tail - head] = place[state.fifo[head:tail]]
        if len(keep):
            # Slots not in use keep the rows of requests that are done; they are never read.
            state.row[:] = np.where(keep[state.row], place[state.row], 0)
        state.pending_row[:pending] = place[state.pending_row[:pending]]
        self._state = state._replace(fifo=fifo)
        ints[core.FIFO_HEAD] = 0
        ints[core.FIFO_TAIL] = tail - head
        ints[core.NEXT_ROW] = int(keep[: ints[core.NEXT_ROW]].sum())
        self._row = longer(self._row, np.arange(self._fed, self._fed + n_new))
        self._accepted = longer(self._accepted, self._fits(block))
        first = min(max(self._concurrency - self._fed, 0), n_new)  # R3: the clients' first requests
        if first:
            times = np.append(state.pending_time[:pending], block.arrival_s[:first])
            rows = np.append(state.pending_row[:pending], n_old + np.arange(first))
            order = np.lexsort((rows, times))  # a sorted array is a heap
            state.pending_time[: pending + first] = times[order]
            state.pending_row[: pending + first] = rows[order]
            ints[core.N_PENDING] = pending + first
            ints[core.NEXT_ROW] += first
        self._fed += n_new
        self.largest_frame = max(self.largest_frame, n_old + n_new)

    def _fits(self, block: Requests) -> NDArray[np.bool_]:
        """R4: which requests will not be rejected."""
        settings = self._settings
        longest = block.prompt_tokens + block.max_tokens
        fits = -(-(longest - 1) // settings.block_size) <= settings.num_kv_blocks
        if settings.max_model_len:
            fits &= longest <= settings.max_model_len
        return np.asarray(fits)

    def _done(self) -> NDArray[np.bool_]:
        status = self._out.status
        return np.asarray((status == FINISHED) | (status == REJECTED))
