"""What a fleet of independent replicas did: their engine results side by side, and the laws they must obey."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import (
    FINISHED,
    ITL_BINS,
    REJECTED,
    RUNNING,
    STATUS_NAMES,
    WAITING,
    EngineResult,
    Requests,
    SpeculationResult,
)
from simulator.fleet.records import joined
from simulator.results.tables import REQUEST_STATES, Table
from simulator.roofline.step_cost import StepCost

Array = NDArray[np.float64]

#: Relative tolerance of chip-time conservation: sums of up to 1e8 doubles stay far inside it.
TOLERANCE = 1e-9

if STATUS_NAMES != REQUEST_STATES:
    raise ImportError("the engine's status codes and the result schema's states differ")


class ConservationError(Exception):
    """A run broke a conservation law: a fault of this program, never of its input."""


@dataclass(frozen=True)
class Outcome:
    """A stream of requests served by equal replicas.

    ``requests`` is the whole stream; ``replicas`` are the engines' results, each over its own rows.
    """

    requests: Requests
    replicas: tuple[EngineResult, ...]
    chips_per_replica: int
    itl_counts_measured: NDArray[np.int64] | None = None
    """Inter-token latencies, by the bins of :mod:`simulator.engine.records`, of the steps that started inside the measured
    window, all replicas. None if the window was not known during the run."""
    rows: tuple[NDArray[np.int64], ...] | None = None
    """Which requests each replica was sent; None: request i went to replica i mod N."""
    until_s: float = 0.0
    """When the whole fleet was done, of which these replicas are a part. [s]"""

    @property
    def own_rows(self) -> Sequence[NDArray[np.int64] | slice]:
        """Which requests each replica was sent."""
        if self.rows is not None:
            return self.rows
        return [slice(r, None, self.n_replicas) for r in range(self.n_replicas)]

    @property
    def replica_of(self) -> NDArray[np.int32]:
        """[n] who was sent each request; −1: nobody."""
        found = np.full(len(self.requests), -1, dtype=np.int32)
        for r, rows in enumerate(self.own_rows):
            found[rows] = r
        return found

    @property
    def n_replicas(self) -> int:
        """Number of replicas."""
        return len(self.replicas)

    @property
    def chips(self) -> int:
        """Chips of the fleet."""
        return self.n_replicas * self.chips_per_replica

    @property
    def end_s(self) -> float:
        """Clock when the last replica ended. [s]"""
        return max(self.until_s, *(replica.end_s for replica in self.replicas))

    @property
    def busy_s(self) -> float:
        """Replica time with a step in progress, all replicas together. [s]"""
        return sum(replica.end_s - replica.idle_s for replica in self.replicas)

    @property
    def idle_s(self) -> float:
        """Replica time without a step until the last replica ended. [s]"""
        return sum(replica.idle_s + (self.end_s - replica.end_s) for replica in self.replicas)

    @property
    def speculates(self) -> bool:
        """Whether the replicas decode speculatively."""
        return self.replicas[0].speculation is not None

    @property
    def speculation(self) -> SpeculationResult | None:
        """What speculative decoding did, all replicas; ``wasted_s`` in stream order. None without it."""
        parts = [replica.speculation for replica in self.replicas if replica.speculation is not None]
        if not parts:
            return None
        wasted = np.zeros(len(self.requests))
        for rows, part in zip(self.own_rows, parts, strict=True):
            wasted[rows] = part.wasted_s
        return SpeculationResult(
            passes=np.asarray(np.sum([part.passes for part in parts], axis=0)),
            keys=np.asarray(np.sum([part.keys for part in parts], axis=0)),
            window_keys=np.asarray(np.sum([part.window_keys for part in parts], axis=0)),
            chunk_steps=np.asarray(np.sum([part.chunk_steps for part in parts], axis=0)),
            drafted_tokens=sum(part.drafted_tokens for part in parts),
            extra_tokens=sum(part.extra_tokens for part in parts),
            wasted_s=wasted,
            draft_s=sum(part.draft_s for part in parts),
        )

    def column(self, name: str) -> NDArray[Any]:
        """One per-request array of the engine results, in stream order."""
        return joined(len(self.requests), name, self.own_rows, self.replicas)

    def total(self, name: str) -> float:
        """Sum of one entry of ``totals`` over replicas."""
        return sum(replica.totals[name] for replica in self.replicas)

    def peak(self, name: str) -> float:
        """Largest of one entry of ``totals`` over replicas."""
        return max(replica.totals[name] for replica in self.replicas)

    @property
    def steps_by_tokens(self) -> NDArray[np.int64]:
        """Steps with n dense tokens, all replicas."""
        return np.asarray(np.sum([replica.steps_by_tokens for replica in self.replicas], axis=0))

    @property
    def steps_by_rows(self) -> NDArray[np.int64]:
        """Steps with R logit rows, all replicas."""
        return np.asarray(np.sum([replica.steps_by_rows for replica in self.replicas], axis=0))

    @property
    def itl_counts(self) -> NDArray[np.int64]:
        """Inter-token latency histogram of all replicas, by the bins of :mod:`simulator.engine.records`.

        One count per token: those that come with others of their pass are in bin 0.
        """
        counts = np.zeros(ITL_BINS, dtype=np.int64)
        for replica in self.replicas:
            counts += replica.itl_counts
            counts[0] += replica.speculation.extra_tokens if replica.speculation else 0
        return counts


def split(requests: Requests, replicas: int) -> list[Requests]:
    """Round robin: request i goes to replica i mod ``replicas``; closed-loop clients are divided the same way."""
    return [
        requests.take(slice(r, None, replicas), concurrency=len(range(r, requests.concurrency, replicas)))
        for r in range(replicas)
    ]


def requests_table(outcome: Outcome) -> Table:
    """Rows of ``requests.parquet``."""
    requests = outcome.requests
    n, chips = len(requests), outcome.chips_per_replica
    arrival = outcome.column("arrival_s")
    scheduled, first = outcome.column("scheduled_s"), outcome.column("first_token_s")
    finish = outcome.column("finish_s")
    ttft, e2e = first - arrival, finish - arrival
    gaps = requests.output_tokens - 1
    tpot = np.full(n, np.nan)
    np.divide(e2e - ttft, gaps, out=tpot, where=gaps > 0)
    return {
        "request": np.arange(n),
        "replica": outcome.replica_of,
        "pool": np.zeros(n, dtype=np.int32),
        "prefill_replica": outcome.replica_of,
        "status": outcome.column("status"),
        "arrival_s": arrival,
        "scheduled_s": scheduled,
        "first_token_s": first,
        "finish_s": finish,
        "queue_s": scheduled - arrival,
        "load_s": outcome.column("load_s"),
        "transfer_s": np.zeros(n),
        "ttft_s": ttft,
        "tpot_s": tpot,
        "e2e_s": e2e,
        "prompt_tokens": requests.prompt_tokens,
        "cached_tokens": outcome.column("reused_tokens"),
        "output_tokens": requests.output_tokens,
        "priority": np.zeros(n, dtype=np.int64) if requests.priority is None else requests.priority,
        "tenant": np.zeros(n, dtype=np.int64) if requests.tenant is None else requests.tenant,
        "attempts": outcome.column("attempts"),
        "preemptions": outcome.column("preemptions"),
        "chip_s_busy": outcome.column("busy_s") * chips,
        "chip_s_prefill": outcome.column("busy_prefill_s") * chips,
        "chip_s_cached": outcome.column("busy_cached_s") * chips,
        "chip_s_recompute": outcome.column("recompute_s") * chips,
        "chip_s_swap": outcome.column("swap_s") * chips,
        "chip_s_wasted": outcome.column("wasted_s") * chips,
    }


def timeline_table(
    outcome: Outcome, *, num_kv_blocks: int, idle_power_w: float | None, busy_power_w: float | None
) -> Table:
    """Rows of ``timeline.parquet``; powers are of one chip, idle and at the run's mean utilisation."""
    columns: dict[str, list[NDArray[np.generic]]] = {}
    for r, replica in enumerate(outcome.replicas):
        timeline = replica.timeline
        rows = len(timeline["start_s"])
        busy = timeline["busy_fraction"]
        power = np.full(rows, np.nan)
        if idle_power_w is not None and busy_power_w is not None:
            power = outcome.chips_per_replica * (idle_power_w + (busy_power_w - idle_power_w) * busy)
        values: dict[str, NDArray[np.generic]] = {
            "replica": np.full(rows, r, dtype=np.int32),
            "start_s": timeline["start_s"],
            "interval_s": np.full(rows, replica.timeline_interval_s),
            "running": timeline["running"],
            "waiting": timeline["waiting"],
            "kv_fraction": timeline["kv_blocks"] / num_kv_blocks,
            "busy_fraction": busy,
            "preemptions_per_s": timeline["preemptions_per_s"],
            "chips": np.full(rows, outcome.chips_per_replica),
            "power_w": power,
        }
        for name, array in values.items():
            columns.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in columns.items()}


def step_time_s(outcome: Outcome, cost: StepCost) -> dict[str, float]:
    """Busy time of all replicas by part of the step, from the counts of steps and the cost tables. [s]

    Raises
    ------
    ConservationError
        If the parts do not sum to the busy time.
    """
    by_tokens, by_rows = outcome.steps_by_tokens, outcome.steps_by_rows
    tokens, rows = len(by_tokens), len(by_rows)
    dense = float(by_tokens @ cost.dense_s[:tokens])
    parts = {name: float(by_tokens @ part[:tokens]) for name, part in cost.dense_parts.items()} or {"dense": dense}
    parts["head"] = float(by_rows @ cost.head_s[:rows])
    parts = {name: time_s / cost.parts for name, time_s in parts.items()}
    # Ranks that wait for the largest one's tokens, and experts that draw more than their share.
    for name in ("padding", "imbalance"):
        if f"{name}_s" in outcome.replicas[0].totals:
            parts[name] = outcome.total(f"{name}_s")
    parts["attention_prefill"] = outcome.total("prefill_attention_s")
    parts["attention_decode"] = outcome.total("decode_attention_s")
    if outcome.speculates:
        parts["draft"] = outcome.total("draft_s")
    host_s = outcome.total("host_s")
    if host_s:
        parts["host"] = host_s
    if any(replica.totals.get("swap_s") for replica in outcome.replicas):
        parts["swap"] = outcome.total("swap_s")
    demand_equal("step parts", sum(parts.values()), "busy time", outcome.busy_s)
    return parts


def check_conservation(outcome: Outcome, cost: StepCost) -> None:
    """Check every run against the laws of ``docs/engine-rules.md`` that its result can show.

    Raises
    ------
    ConservationError
        If requests or chip time are lost or invented, or a request's times are out of order.
    """
    status = outcome.column("status")
    counts = np.bincount(status, minlength=len(STATUS_NAMES))
    if len(counts) != len(STATUS_NAMES) or int(counts.sum()) != len(outcome.requests):
        raise ConservationError(f"{len(outcome.requests)} requests entered, states count {counts.tolist()}")
    for r, replica in enumerate(outcome.replicas):
        shares = float(replica.busy_s.sum())
        demand_equal(f"replica {r}: busy + idle", shares + replica.idle_s, "its time", replica.end_s)
        check_shares(replica.busy_s, replica.busy_prefill_s, replica.busy_cached_s, replica.recompute_s)
        if not (replica.wasted_s <= replica.busy_s * (1 + TOLERANCE)).all():
            raise ConservationError(f"replica {r}: more of a query's busy time was wasted than there was")
        if replica.speculation is not None and not (replica.speculation.wasted_s >= 0).all():
            raise ConservationError(f"replica {r}: a query wasted less than nothing")
    chip_time = outcome.chips * outcome.end_s
    demand_equal("fleet: busy + idle", (outcome.busy_s + outcome.idle_s) * outcome.chips_per_replica, "it", chip_time)
    done = status == FINISHED
    check_order(*(outcome.column(name)[done] for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s")))
    if not np.isin(status, (RUNNING, WAITING)).any():
        _check_tokens(outcome, done)
    step_time_s(outcome, cost)


def check_shares(busy: Array, prefill: Array, cached: Array, recompute: Array) -> None:
    """Raise :class:`ConservationError` if a part of a query's busy time exceeds the whole."""
    if not (
        (prefill <= busy * (1 + TOLERANCE)).all()
        and (cached <= prefill * (1 + TOLERANCE)).all()
        and (recompute <= prefill * (1 + TOLERANCE)).all()
    ):
        raise ConservationError("a part of a query's busy time exceeds the whole")


def check_order(arrival: Array, scheduled: Array, first: Array, finish: Array) -> None:
    """Raise :class:`ConservationError` if the times of finished requests are out of order (I5)."""
    if not ((arrival <= scheduled).all() and (scheduled < first).all() and (first <= finish).all()):
        raise ConservationError("a finished request's arrival, schedule, first token and finish are out of order")


def _check_tokens(outcome: Outcome, done: NDArray[np.bool_]) -> None:
    requests = outcome.requests
    computed = requests.prompt_tokens - outcome.column("reused_tokens") + requests.output_tokens - 1
    check_tokens(outcome, int(computed[done].sum()), int(requests.output_tokens[done].sum()))


def check_tokens(outcome: Outcome, computed: int, emitted: int) -> None:
    """Check what the steps did against what the finished requests needed (I7).

    Raises
    ------
    ConservationError
        If tokens to compute (prompt − cached + output − 1 of each, and rejected drafts) or to emit are not those the
        steps counted.
    """
    rejected = sum(replica.speculation.rejected_tokens for replica in outcome.replicas if replica.speculation)
    wanted = computed + int(outcome.total("recomputed_tokens") + outcome.total("abandoned_tokens")) + rejected
    found = int(outcome.total("dense_tokens"))
    if wanted != found:
        raise ConservationError(f"steps computed {found} tokens, finished and abandoned requests needed {wanted}")
    emitted += int(outcome.total("abandoned_outputs"))
    if emitted + rejected != int(outcome.total("rows")):
        raise ConservationError(
            f"{int(outcome.total('rows'))} logit rows, but {emitted} tokens were emitted and {rejected} drafts rejected"
        )


def demand_equal(left: str, a: float, right: str, b: float) -> None:
    """Raise :class:`ConservationError` unless two times agree to :data:`TOLERANCE`. [s]"""
    if not abs(a - b) <= TOLERANCE * max(abs(a), abs(b)):
        raise ConservationError(f"{left} = {a!r} s, but {right} = {b!r} s")


def state_counts(outcome: Outcome) -> dict[str, int]:
    """Requests in each final state."""
    counts = np.bincount(outcome.column("status"), minlength=len(STATUS_NAMES))
    return dict(zip(STATUS_NAMES, map(int, counts), strict=True))


def accepted(outcome: Outcome) -> NDArray[np.bool_]:
    """Requests that arrived and were not rejected."""
    return np.asarray((outcome.column("status") != REJECTED) & ~np.isnan(outcome.column("arrival_s")))


def timeline_integral(replica: EngineResult, name: str, edges: Array) -> Array:
    """Integral of a timeline column of one replica between ``edges``; it is constant within each timeline interval."""
    timeline, width = replica.timeline, replica.timeline_interval_s
    if len(timeline["start_s"]) == 0:
        return np.zeros(len(edges) - 1)
    # A replica's last interval may reach past its end, where nothing happens.
    starts = np.append(timeline["start_s"], min(timeline["start_s"][-1] + width, replica.end_s))
    cumulative = np.append(0.0, np.cumsum(timeline[name] * width))
    return np.diff(np.interp(edges, starts, cumulative))


def fleet_mean(replicas: Sequence[EngineResult], name: str, edges: Array) -> Array:
    """Sum over replicas of the means of a timeline column between ``edges``."""
    integral = np.sum([timeline_integral(replica, name, edges) for replica in replicas], axis=0)
    return np.asarray(integral / np.diff(edges))
