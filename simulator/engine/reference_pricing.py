"""What a step of the reference engine costs, and who pays: rules R9, R11, R12, P4, P5, G3 to G5, E3, E4 and H1, in the order of M16."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from simulator.engine.records import EngineSettings
from simulator.engine.reference_speculation import Speculator
from simulator.engine.reference_state import Plan, Request, Work
from simulator.engine.reference_swap import HostPool
from simulator.roofline.step_cost import StepCost, window_keys


@dataclass(frozen=True)
class Part:
    """Time of a step on one rank, or in one stage: device, then copies, then host. [s]"""

    dense_s: float
    """Dense layers, of the widest rank and uneven experts included: within the device's time."""
    device_s: float
    copies_s: float
    host_s: float

    @property
    def time_s(self) -> float:
        """All of it."""
        return self.device_s + self.copies_s + self.host_s


COUNTS = ("steps", "dense_tokens", "decode_tokens", "decode_keys", "prefill_pairs", "prefill_keys", "chunks")
WINDOWED = ("window_decode_keys", "window_prefill_pairs", "window_prefill_keys")
MORE = ("rows", "preemptions", "recomputed_tokens", "segments", "max_running", "max_waiting", "max_kv_blocks")
CLIENTS = ("timeouts", "cancellations", "retries", "abandoned_tokens", "abandoned_outputs")
TIMES = ("decode_attention_s", "prefill_attention_s", "host_s")


@dataclass
class Pricing:
    """The cost tables of a replica, and the sums over its steps."""

    cost: StepCost
    """Of the whole replica: with several stages their sum."""
    stages: Sequence[StepCost]
    settings: EngineSettings
    speculator: Speculator | None
    steps_by_tokens: list[int] = field(default_factory=list)
    steps_by_rows: list[int] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start all sums at 0."""
        settings = self.settings
        self.steps_by_tokens = [0] * (settings.max_num_batched_tokens + 1)
        self.steps_by_rows = [0] * (settings.max_rows + 1)
        self.excess = settings.expert_skew.excess().tolist()
        self.totals = dict.fromkeys(COUNTS + WINDOWED + MORE + CLIENTS, 0) | dict.fromkeys(TIMES, 0.0)

    def work_of(self, plan: Plan) -> Work:
        """Sums over the scheduled requests (R9, P4)."""
        decodes = [request for request in plan.batch if not request.in_prefill]
        pieces = [(one.computed, tokens) for one, tokens in plan.batch.items() if one.in_prefill]
        chunks = [chunk_work(self.cost, past, tokens) for past, tokens in pieces]
        rows = sum(1 if one.in_prefill else tokens for one, tokens in plan.batch.items() if self.emits(one, tokens))
        A, K, P, AW, KW = (sum(chunk[i] for chunk in chunks) for i in range(5))
        return Work(
            n=sum(plan.batch.values()),
            B=len(decodes),
            S=sum(self.context(request) for request in decodes),
            P=P,
            A=A,
            K=K,
            R=rows,
            SW=sum(self.seen(request) for request in decodes),
            AW=AW,
            KW=KW,
        )

    @staticmethod
    def emits(request: Request, tokens: int) -> bool:
        """Whether a scheduled request has a token to emit at the end (R10)."""
        return not request.in_prefill or request.computed + tokens == request.known

    def context(self, request: Request) -> float:
        """Keys that a decoding request's last token sees (R9, P4)."""
        return request.computed + 1 if self.speculator is None else self.speculator.context(request)

    def seen(self, request: Request) -> float:
        """As :meth:`context`, in the windowed layers."""
        if not self.cost.window or self.speculator is None:
            return keys_in_window(self.cost, request.computed + 1)
        return self.speculator.seen(request)

    def excess_s(self, cost: StepCost, step: int, width: int) -> float:
        """What uneven experts add to the dense layers of a step (G5). [s]"""
        if not self.excess or not len(cost.expert_s):
            return 0.0
        return float(self.excess[step % len(self.excess)] * cost.expert_s[width])

    def part(self, stage: int, dense_s: float, host: HostPool | None, plan: Plan, work: Work) -> Part:
        """Time of one scheduler's step in a stage whose dense layers take ``dense_s`` (M16, M17, M18)."""
        cost = self.stages[stage]
        rest = asdict(work) | {"n": 0}
        if self.speculator is None:
            device_s = dense_s + cost.step_s(**rest)
        else:
            decodes_s = self.speculator.decode_s(plan.level, work.B, work.S, work.SW)
            chunk_s = self.speculator.chunk_s(chunk_tokens(plan))
            decodes_s += float(cost.decode_walk_s[work.B]) * work.S
            device_s = dense_s + cost.step_s(**rest | {"B": 0, "S": 0, "SW": 0}) + decodes_s + chunk_s
        copies_s = host.delay_s(device_s) if host is not None else 0.0
        host_s = self.host_s(work.n, len(plan.batch), device_s + copies_s) if stage == 0 else 0.0
        return Part(dense_s, device_s, copies_s, host_s)

    def host_s(self, n: int, sequences: int, device_s: float) -> float:
        """Time by which the host makes a step longer (H1). [s]"""
        host = self.settings.host
        work_s = host.step_s + host.sequence_s * sequences + host.token_s * n
        return max(0.0, work_s - device_s) if host.asynchronous else work_s

    def charge(self, stage: int, part: Part, plan: Plan, work: Work) -> int:
        """Let requests pay their shares of a part of a step, copies apart (R11, R12, P5); return the tokens computed again."""
        cost, recomputed = self.stages[stage], 0
        per_token_s = (part.dense_s + part.host_s) / work.n
        per_row_s = float(cost.head_s[work.R]) / work.R if work.R else 0.0
        piece = max(j for j, knot in enumerate(cost.decode_knots) if knot <= work.S)
        slope_s, walk_s = float(cost.decode_slope_s[piece]), float(cost.decode_walk_s[work.B])
        intercept_s = float(cost.decode_value_s[piece]) - slope_s * float(cost.decode_knots[piece])
        planes = [[float(entry) for entry in plane] for plane in cost.prefill_planes]
        plane = max(planes, key=lambda plane: dot(plane, (work.A, work.K, work.P, work.AW, work.KW)))
        prompt_tokens = chunk_tokens(plan)
        chunk_s = self.speculator.chunk_s(prompt_tokens) / prompt_tokens if self.speculator and prompt_tokens else 0.0
        for request, tokens in plan.batch.items():
            start, stop = request.computed, request.computed + tokens
            if self.speculator is not None and not request.in_prefill:
                level, B, S = plan.level, work.B, work.S
                request.busy_s += self.speculator.share(request, level, B, S, per_token_s, per_row_s)
                request.busy_s += walk_s * self.speculator.context(request)
                continue
            share_s = per_token_s * tokens
            if stop == request.known:
                share_s += per_row_s
            if request.in_prefill:
                share_s += chunk_s * tokens
                share_s += dot(plane, chunk_work(cost, start, tokens))
                again = max(0, min(stop, request.seen) - start)
                request.busy_prefill_s += share_s
                request.busy_cached_s += plane[1] * request.start
                request.recompute_s += share_s * again / tokens
                recomputed += again
            else:
                share_s += (slope_s + walk_s) * (start + 1) + intercept_s / work.B + cost.decode_seq_s
                share_s += cost.window_slope_s * keys_in_window(cost, start + 1)
            request.busy_s += share_s
        return recomputed

    def count(self, plan: Plan, work: Work) -> None:
        """Add a scheduler's step to the sums (R14)."""
        cost = self.cost
        decode_s = cost.decode_attention_s(work.S, work.B) + cost.window_slope_s * work.SW
        decode_s += cost.decode_seq_s * work.B
        if self.speculator is not None:
            level, B, S, SW = plan.level, work.B, work.S, work.SW
            self.speculator.count(level, B, S, SW, chunk_tokens(plan))
            decode_s = self.speculator.decode_s(level, B, S, SW) - self.speculator.draft_s(level, B, S)
            decode_s += float(cost.decode_walk_s[B]) * S
        self.steps_by_tokens[work.n] += 1
        self.steps_by_rows[work.R] += 1
        self.add(
            steps=1,
            segments=1,
            dense_tokens=work.n,
            decode_tokens=work.B,
            decode_keys=work.S,
            prefill_pairs=work.A,
            prefill_keys=work.K,
            window_decode_keys=work.SW,
            window_prefill_pairs=work.AW,
            window_prefill_keys=work.KW,
            chunks=work.P,
            rows=work.R,
            decode_attention_s=decode_s if work.B else 0.0,
            prefill_attention_s=cost.prefill_attention_s(work.A, work.K, work.P, work.AW, work.KW),
        )

    def count_idle_ranks(self, ranks: int) -> None:
        """Count ranks that take part in a step with an empty batch (G6)."""
        self.totals["steps"] += ranks
        self.steps_by_tokens[0] += ranks
        self.steps_by_rows[0] += ranks

    def add(self, **amounts: float) -> None:
        """Add to some of the totals."""
        for name, amount in amounts.items():
            self.totals[name] += amount

    def note_peaks(self, **now: float) -> None:
        """Raise some of the totals to what is the case now."""
        for name, value in now.items():
            self.totals[name] = max(self.totals[name], value)


def chunk_tokens(plan: Plan) -> int:
    """Tokens of a step that belong to prompts."""
    return sum(tokens for request, tokens in plan.batch.items() if request.in_prefill)


def keys_in_window(cost: StepCost, context: int) -> int:
    """Keys that the query at ``context`` sees in the windowed layers (R9)."""
    return int(window_keys(context, cost.window, chunked=cost.window_chunked))


def chunk_work(cost: StepCost, past: int, tokens: int) -> tuple[int, int, int, int, int]:
    """Return what a chunk of ``tokens`` on ``past`` earlier ones adds to A, K, P, AW and KW (R9)."""
    stop, window = past + tokens, cost.window
    if not window:
        return pairs(past, tokens), stop, 1, 0, 0
    window_pairs = sum(keys_in_window(cost, context) for context in range(past + 1, stop + 1))
    keys = past % window + tokens if cost.window_chunked else min(stop, tokens + window - 1)
    return pairs(past, tokens), stop, 1, window_pairs, keys


def pairs(past: int, tokens: int) -> int:
    """Count the (query, key) pairs of a chunk of ``tokens`` on ``past`` earlier tokens, its own included.

    >>> pairs(10, 3)  # 11 + 12 + 13
    36
    """
    return tokens * past + tokens * (tokens + 1) // 2


def dot(coefficients: Sequence[float], amounts: Sequence[Any]) -> float:
    """Sum of products.

    >>> dot([0.5, 0.25], [3, 4])
    2.5
    """
    return sum((a * b for a, b in zip(coefficients, amounts, strict=True)), start=0.0)
