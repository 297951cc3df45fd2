"""Speculative decoding in the reference engine: the rules of docs/engine-speculation.md, one pass of one request at a time.

Besides the deterministic progress that both engines share (P3) there is the token-by-token variant: each pass
draws how many drafts are accepted. Only the reference engine has it; it measures what P3 costs in accuracy.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import (
    PROGRESS_BITS,
    EngineSettings,
    Requests,
    Speculation,
    SpeculationResult,
    drafted_tokens,
)
from simulator.randomness import BLOCK, uniform
from simulator.roofline.step_cost import StepCost

UNIT = 1 << PROGRESS_BITS


class Sequence(Protocol):
    """What speculation needs to know of a request."""

    row: int
    prompt_tokens: int
    computed: int
    emitted: int
    output_tokens: int


@dataclass
class Speculator:
    """Passes of one replica, on all its ranks; ``level`` is that of the rank's step.

    ``acceptance_seed`` None: progress by P3; otherwise every pass draws its accepted drafts.
    """

    plan: Speculation
    cost: StepCost
    settings: EngineSettings
    requests: Requests
    acceptance_seed: int | None = None

    progress: list[int] = field(default_factory=list)
    """Tokens by row, in units of 2**-16."""
    passes_of: list[int] = field(default_factory=list)
    wasted_s: list[float] = field(default_factory=list)
    extra_tokens: int = 0
    chunk_draft_s: float = 0.0
    decode_draft_s: float = 0.0
    draws: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Set up empty counts."""
        n, seqs, tokens = len(self.requests), self.settings.max_num_seqs, self.settings.max_num_batched_tokens
        self.levels = self.plan.levels(seqs, tokens)
        self.progress, self.passes_of, self.wasted_s = [0] * n, [0] * n, [0.0] * n
        self.passes = np.zeros((len(self.plan.cost.queries), seqs + 1), dtype=np.int64)
        self.keys, self.window_keys = np.zeros(len(self.passes)), np.zeros(len(self.passes))
        self.chunk_steps = np.zeros(tokens + 1, dtype=np.int64)

    def queries(self, level: int) -> int:
        """Tokens verified per sequence."""
        return int(self.plan.cost.queries[level])

    def level(self, decoding: int) -> int:
        """The level of a step from the decoding sequences before anything is scheduled (P1)."""
        return int(self.levels[decoding]) if decoding else 0

    def begin_attempt(self, row: int) -> None:
        """Start from nothing (M20)."""
        self.progress[row] = 0

    def slots(self, request: Sequence) -> int:
        """KV slots a decoding request must own before its pass (P2)."""
        return request.computed + 1 + self.plan.cost.lookahead

    def rate(self, request: Sequence, level: int) -> int:
        """Tokens per pass, in units of 2**-16 (P3)."""
        classes = self.requests.acceptance_class
        return int(self.plan.rates[0 if classes is None else classes[request.row], level])

    def context(self, request: Sequence) -> float:
        """Keys the request's last token sees, with the fraction of its progress (P4)."""
        return request.prompt_tokens + self.progress[request.row] / UNIT

    def seen(self, request: Sequence) -> float:
        """Of those, the ones windowed layers see (P4)."""
        context, window = self.context(request), self.cost.window
        if self.cost.window_chunked:
            return (context - 1) % window + 1
        return min(context, window)

    def decode_s(self, level: int, B: int, S: float, SW: float) -> float:
        """What decoding sequences add to a step besides dense layers and head (P4)."""
        return self.plan.cost.decode_s(level, B=B, S=S, SW=SW)

    def chunk_s(self, tokens: int) -> float:
        """The drafter's pass over a step's chunks (P4)."""
        return float(self.plan.cost.chunk_s[tokens])

    def draft_s(self, level: int, B: int, S: float) -> float:
        """Drafting, within :meth:`decode_s`."""
        return self.plan.cost.drafting_s(level, B=B, S=S)

    def share(self, request: Sequence, level: int, B: int, S: float, per_token_s: float, per_row_s: float) -> float:
        """A decoding request's share of a step, dense layers and head included; notes what of it is wasted (P5)."""
        cost, q = self.plan.cost, self.queries(level)
        piece = max(j for j, knot in enumerate(cost.knots) if knot <= S)
        knot = float(cost.knots[piece])
        slope_s, draft_slope_s = float(cost.slope_s[level, piece]), float(cost.draft_slope_s[level, piece])
        intercept_s = float(cost.value_s[level, piece]) - slope_s * knot
        context = self.context(request)
        draft_s = (float(cost.draft_s[level, B] + cost.draft_value_s[level, piece]) - draft_slope_s * knot) / B
        draft_s += draft_slope_s * context
        if q > 1:
            rejected = q - self.rate(request, level) / UNIT
            self.wasted_s[request.row] += rejected * (per_token_s + per_row_s + draft_s / (q - 1))
        window_s = float(cost.window_slope_s[level]) * self.seen(request) if self.cost.window else 0.0
        own_s = slope_s * context + intercept_s / B + float(cost.seq_s[level]) + window_s
        return q * (per_token_s + per_row_s) + own_s + draft_s

    def count(self, level: int, B: int, S: float, SW: float, chunk_tokens: int) -> None:
        """Count a step."""
        if B:
            self.decode_draft_s += self.draft_s(level, B, S)
            self.passes[level, B] += 1
            self.keys[level] += S
            self.window_keys[level] += SW
        if chunk_tokens:
            self.chunk_steps[chunk_tokens] += 1
            self.chunk_draft_s += self.chunk_s(chunk_tokens)

    def first(self, request: Sequence) -> None:
        """Note the token that a completed prompt emits: one, without drafts (P3)."""
        self.progress[request.row] += UNIT

    def take(self, request: Sequence, level: int) -> int:
        """End a pass: return the tokens it emits (P3)."""
        row = request.row
        before = self.progress[row] // UNIT
        if self.acceptance_seed is None:
            self.progress[row] += self.rate(request, level)
        else:
            self.progress[row] += UNIT * (1 + self._accepted(request, level))
        tokens = min(self.progress[row] // UNIT - before, request.output_tokens - request.emitted)
        self.extra_tokens += tokens - 1
        return tokens

    def _accepted(self, request: Sequence, level: int) -> int:
        """Accepted drafts of the request's next pass: a function of (seed, row, pass)."""
        row = request.row
        number = self.passes_of[row]
        self.passes_of[row] += 1
        if number % BLOCK == 0:
            self.draws[row] = uniform(self.acceptance_seed or 0, f"acceptance/{row}", number, number + BLOCK)
        classes = self.requests.acceptance_class
        survival = self.plan.survival[0 if classes is None else classes[row], level]
        return int((self.draws[row][number % BLOCK] < survival).sum())

    def result(self) -> SpeculationResult:
        """What has been counted."""
        return SpeculationResult(
            passes=self.passes,
            keys=self.keys,
            window_keys=self.window_keys,
            chunk_steps=self.chunk_steps,
            drafted_tokens=drafted_tokens(self.plan.cost, self.passes),
            extra_tokens=self.extra_tokens,
            wasted_s=np.array(self.wasted_s),
            draft_s=self.decode_draft_s + self.chunk_draft_s,
        )
