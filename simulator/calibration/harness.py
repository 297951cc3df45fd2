"""Simulate a measurement the way it was taken, and read off what the client would have reported.

*Closed loop.* ``clients`` keep one request each in flight until ``n_requests`` are done; the burst at the start counts, as in
the published means. A client sees its first token ``request_s`` later than the engine had it, and neither a chip nor the next
request waits for that: delays between a finish and the next request, of more than a step, would bunch runs of fixed lengths as
no measurement shows. Where the scheduler looks for new requests only every ``poll_steps`` steps, a request waits for a uniform share of
that many mean steps; where it holds prompts back for company, for all ``hold_steps``.

*Admission.* Engines that reserve a request's whole length before they admit it (``reserve_output``) run at most as many requests as
fit at their mean length, prompt and output, and so never preempt.

*Layouts.* Tensor-parallel engines run as they are. Three layouts are approximated by one engine that stands for its
equals:

- attention ranks that share experts: each rank has an equal part of the clients, and every rank holds the same batch at every
  step. Real ranks wait for the fullest, so this is a lower bound of the step;
- pipeline stages: as many micro-batches are in flight as there are stages, each with its part of the clients and of the KV
  cache; a micro-batch's step is a round, in which every micro-batch is as large as it, and all wait for the last stage, which has
  the output head. Sends hide behind that wait;
- several workers in a pool: requests are dealt out in turn.

*Prefill and decode pools.* A request arrives at the decode pool when the prefill pool has its first token and the KV cache has
crossed the network, and its client sends the next one when the decode pool has finished it. Prefill needs the decode latencies as
think times and decode needs the prefill finishes as arrivals; the two are run in turn until the means stand still. The client sees its
first token from the decode pool: after the transfer, the wait for a seat and a step there, and where that pool answers only every
``stream_interval`` steps, with the first answer it sends.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from simulator.calibration.measurements import Measurement, Pool
from simulator.calibration.tables import latency_metrics
from simulator.catalog.architecture import GatedDeltaNet, Mamba2, MoEFFN
from simulator.catalog.chips import ChipSpec, Efficiency, load_chip
from simulator.catalog.draws import Draws, drawn_efficiencies
from simulator.catalog.engines import EngineProfile, engine_profile
from simulator.catalog.models import load_model
from simulator.catalog.slices import Slice, legal_slices, resolve_slice
from simulator.engine.records import FINISHED, EngineSettings, Requests
from simulator.errors import InfeasibleError, UnpriceableError
from simulator.randomness import uniform
from simulator.roofline.engine_profile import KernelCost, apply_profile, fit_kv_blocks, in_stages, kernel_cost
from simulator.roofline.memory import MemoryFit
from simulator.roofline.pipeline import shard
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharding import Sharding
from simulator.roofline.step_cost import StepCost

BLOCK_SIZE = 16
HANDOVERS = 4
"""Rounds between a prefill and a decode pool; the means move by less than 1 % after three."""

FEWEST_SEATS = 16
"""Seats of a model with recurrent states, of which each takes memory."""
TABLE_STEP = 512
"""Tokens by which cost tables grow."""

Prediction = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Replica:
    """One engine that stands for its equals in a pool.

    Attributes
    ----------
    kernels, fit
        its kernels and its memory.
    equals
        engines like it in the pool: workers × (attention ranks or micro-batches in flight).
    micro_batches
        that share its KV cache.
    max_num_seqs, max_num_batched_tokens
        limits of its scheduler.
    """

    kernels: KernelCost
    fit: MemoryFit
    equals: int
    micro_batches: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def settings(self, profile: EngineProfile, requests: Requests) -> EngineSettings:
        """Scheduler limits and KV blocks under a profile, for some requests.

        Raises
        ------
        InfeasibleError
            If no block is left.
        """
        blocks = fit_kv_blocks(self.fit, profile) // self.micro_batches
        if blocks < 1:
            raise InfeasibleError(
                f"the model does not fit: weights take {self.fit.weights_bytes / 1e9:.1f} GB of the "
                f"{self.fit.capacity_bytes / 1e9:.1f} GB of a chip, and nothing is left for the KV cache"
            )
        seats = self.max_num_seqs
        if profile.reserve_output:
            longest = requests.prompt_tokens + requests.output_tokens
            whole = float(self.fit.groups.blocks(longest, BLOCK_SIZE).mean())
            seats = max(1, min(seats, int(blocks / whole)))
        return EngineSettings(seats, self.max_num_batched_tokens, BLOCK_SIZE, blocks, kv_groups=self.fit.groups)


@dataclass(frozen=True)
class KernelDraw:
    """One of several draws of what a chip's calibration leaves uncertain."""

    draws: Draws
    index: int

    def efficiency(self, chip: ChipSpec, kernels: str) -> Efficiency:
        """The efficiencies of a chip in this draw, under an engine with the kernels of a framework."""
        return _drawn_efficiencies(chip.name, kernels, self.draws)[self.index]


@lru_cache(maxsize=8)
def _drawn_efficiencies(chip: str, kernels: str, draws: Draws) -> list[Efficiency]:
    spec = load_chip(chip)
    return drawn_efficiencies(spec, spec.efficiency, draws, kernels=kernels)


def replica(m: Measurement, pool: Pool, profile: EngineProfile, draw: KernelDraw | None = None) -> Replica:
    """Price one engine of a measurement's pool; the kernels do not depend on the profile's times, only on its limits.

    ``draw`` None: kernels as they were fitted.

    Raises
    ------
    InputError, UnpriceableError
        If the model cannot be laid out so, or not be priced.
    """
    sequences = pool.max_num_seqs or profile.max_num_seqs
    if m.load == "closed" and _has_states(m.model):
        # Room for a state is kept for every seat; no more are taken than there are clients. In powers of two, for the tables' sake.
        clients = -(-m.clients // (pool.workers * pool.pp * pool.dp))
        sequences = min(sequences, max(FEWEST_SEATS, 1 << (clients - 1).bit_length()))
    tokens = max(pool.max_num_batched_tokens or profile.max_num_batched_tokens, sequences)
    layout = replace(pool, max_num_seqs=None, max_num_batched_tokens=None, workers=1)
    skew = profile.routing_skew if _has_experts(m.model) else 0.0
    # Tables are made for round sizes, so that runs with nearly the same limits share one.
    room = TABLE_STEP * -(-tokens // TABLE_STEP)
    price = _replica if draw is None else _drawn_replica
    found = price(m.model, m.chip, m.precision, layout, pool.workers, sequences, room, profile.kernels, skew, draw)
    return found if room == tokens else replace(found, max_num_batched_tokens=tokens)


@lru_cache(maxsize=256)
def _has_states(model: str) -> bool:
    return any(isinstance(group.mixer, GatedDeltaNet | Mamba2) for group in load_model(model).layers)


@lru_cache(maxsize=256)
def _has_experts(model: str) -> bool:
    return any(isinstance(group.ffn, MoEFFN) for group in load_model(model).layers)


def _priced(
    model: str,
    chip: str,
    precision: str,
    pool: Pool,
    workers: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kernels: str,
    routing_skew: float,
    draw: KernelDraw | None,
) -> Replica:
    architecture, formats = load_model(model), parse_precision(precision)
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens, "block_size": BLOCK_SIZE}
    a_slice = slice_of(chip, pool.chips)
    whole = shard(
        architecture,
        a_slice,
        Sharding(tp=pool.tp, pp=pool.pp, dp=pool.dp, ep=pool.ep),
        precision=formats,
        efficiency=None if draw is None else draw.efficiency(a_slice.chip, kernels),
        **limits,
    )
    one = whole.stages[0]
    if pool.pp > 1:
        one = replace(one, architecture=architecture, stage=(1, 1))
    layers = kernel_cost(one, kernels=kernels, routing_skew=routing_skew, equal_ranks=True)
    return Replica(
        kernels=in_stages(layers, pool.pp),
        fit=whole.memory,
        equals=workers * pool.pp * pool.dp,
        micro_batches=pool.pp,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
    )


_replica = lru_cache(maxsize=1024)(_priced)
_drawn_replica = lru_cache(maxsize=8)(_priced)
"""Draws are many and each is used for the rows of one deployment, one after the other."""


@lru_cache(maxsize=256)
def slice_of(chip: str, n_chips: int) -> Slice:
    """The slice of so many chips; the most compact one where there are several.

    Raises
    ------
    UnpriceableError
        If the chip has no slice of that size.
    """
    found = [s for spec in legal_slices(chip) if (s := resolve_slice(spec)).n_chips == n_chips]
    if found:
        return min(found, key=lambda s: (s.n_nodes, max(s.domains[0].dims), s.spec))
    nodes = _nodes(resolve_slice(f"{chip}:1").chip, n_chips)
    if nodes is None:
        raise UnpriceableError(f"{chip} has no slice of {n_chips} chips")
    return resolve_slice(f"{chip}:{nodes}")


def _nodes(chip: ChipSpec, n_chips: int) -> str | None:
    """Several full nodes of a chip that has a network between them, as ``2x8``."""
    per_node = max(getattr(chip.scale_up, "sizes", (1,)))
    return f"{n_chips // per_node}x{per_node}" if chip.scale_out is not None and n_chips % per_node == 0 else None


@lru_cache(maxsize=4096)
def lengths(cause: str, longest: int, ratio: float, n: int) -> NDArray[np.int64]:
    """Lengths uniform in [ratio·L, L], at least 1; fixed at ratio 1. [tokens]"""
    low = int(ratio * longest)
    draws = uniform(0, cause, 0, n)
    found = np.asarray(np.maximum(low + np.floor(draws * (longest - low + 1)), 1), dtype=np.int64)
    found.flags.writeable = False  # shared by every call
    return found


def requests_of(m: Measurement, equals: int, profile: EngineProfile) -> Requests:
    """The requests of one of ``equals`` engines; the profile says whether a log's cached prefixes count."""
    if m.replay is not None:
        cached = m.replay.cached_tokens // BLOCK_SIZE * BLOCK_SIZE
        return replace(m.replay, cached_tokens=cached * profile.prefix_caching)
    n = max(1, round(m.n_requests / equals))
    clients = max(1, round(m.clients / equals))
    if m.load == "closed":
        n = max(n, clients)
    cause = f"{m.model}/{m.prompt_tokens}/{m.output_tokens}/{m.range_ratio}/{m.clients}"
    prompt = lengths(f"{cause}/prompt", m.prompt_tokens, m.range_ratio, n)
    output = lengths(f"{cause}/output", m.output_tokens, m.range_ratio, n)
    arrival = np.zeros(n)
    if m.load == "poisson":
        arrival = np.cumsum(-np.log1p(-uniform(0, f"{cause}/arrival", 0, n)) * equals / m.rate_per_s)
    cached = np.zeros(n * m.beams, dtype=np.int64)
    if m.beams > 1:
        arrival = np.repeat(arrival, m.beams)
        prompt, output = (np.repeat(column, m.beams) for column in (prompt, output))
        cached = np.where(np.arange(n * m.beams) % m.beams, np.maximum(prompt - 1, 0), 0)
    return Requests(arrival, prompt, output, cached, output, clients if m.load == "closed" else 0)


def predict(m: Measurement, profile: EngineProfile | None = None, draw: KernelDraw | None = None) -> Prediction:
    """Simulate a measurement under an engine profile; the metrics of ``m.measured`` and more.

    ``profile`` None is the catalogue's for the measurement's engine, ``draw`` None the kernels as they were fitted.

    Raises
    ------
    InputError, UnpriceableError, InfeasibleError
        If the layout is none, cannot be priced, or does not fit.
    """
    used = engine_profile(m.engine) if profile is None else profile
    if len(m.pools) == 1:
        return _predict_unified(m, used, draw)
    return _predict_disaggregated(m, used, draw)


@lru_cache(maxsize=64)  # two megabytes each
def _cost(kernels: KernelCost, profile: EngineProfile) -> StepCost:
    return apply_profile(kernels, profile)


def _predict_unified(m: Measurement, profile: EngineProfile, draw: KernelDraw | None) -> Prediction:
    from simulator.engine.compiled import simulate  # noqa: PLC0415  # numba takes a while to import

    one = replica(m, m.pools[0], profile, draw)
    requests = requests_of(m, one.equals, profile)
    kept = profile if m.memory_fraction is None else profile.with_values(memory_fraction=m.memory_fraction)
    cost, settings = _cost(one.kernels, profile), one.settings(kept, requests)
    result = simulate(cost, settings, requests, timeline_interval_s=TIMELINE_S)
    waits = np.zeros(len(requests))
    if m.poll_steps or m.hold_steps:
        step_s = (result.end_s - result.idle_s) / max(1.0, result.totals["steps"])
        waits = uniform(0, f"{m.model}/{m.clients}/poll", 0, len(requests)) * (m.poll_steps * step_s)
        waits += m.hold_steps * step_s
        requests = replace(requests, arrival_s=requests.arrival_s + waits)
        result = simulate(cost, settings, requests, timeline_interval_s=TIMELINE_S)
    served = result.status == FINISHED
    if not served.all():
        raise InfeasibleError(f"{(~served).sum()} of {len(served)} requests do not fit into the KV cache")
    output = requests.output_tokens
    sent = result.arrival_s - waits
    # A batch queued inside the engine, or an engine's own log, has no client at the other end of a connection.
    client_s = (
        profile.request_s + profile.request_token_s * requests.prompt_tokens if m.load in {"closed", "poisson"} else 0.0
    )
    ttft, e2e = (time_s - sent + client_s for time_s in (result.first_token_s, result.finish_s))
    several = output > 1
    tpot = (result.finish_s - result.first_token_s)[several] / (output - 1)[several]
    found = latency_metrics(ttft, tpot, e2e, quantiles=m.load == "replay")
    if m.load == "closed":
        # The rate that the published tables derive from a closed loop's mean latencies.
        latency_s = found["ttft_s"] + (m.output_tokens - 1) * found.get("tpot_s", 0.0)
        found["output_tokens_per_s"] = m.clients * m.output_tokens / latency_s
    else:
        counted = float(output.sum()) / m.beams
        found["output_tokens_per_s"] = one.equals * counted / (result.end_s - float(sent.min()))
    return found


TIMELINE_S = 1e9
"""Nobody reads the timeline here: one interval."""


def _predict_disaggregated(m: Measurement, profile: EngineProfile, draw: KernelDraw | None) -> Prediction:
    first, second = (replica(m, pool, profile, draw) for pool in m.pools)
    n, clients = m.n_requests, m.clients
    whole = requests_of(m, 1, profile)
    alone = np.ones(n, dtype=np.int64)
    prefill_only = replace(whole, output_tokens=alone, max_tokens=alone)
    # The decode pool computes the last prompt token again, and with it the second output token.
    later = np.maximum(whole.output_tokens - 1, 1)
    transfer_s = whole.prompt_tokens * transfer_s_per_token(m, first)
    think = np.zeros(n)
    sent = first_s = streamed_s = done_s = think
    for _ in range(HANDOVERS):
        sent, first_s, _ = _dealt(first, profile, replace(prefill_only, arrival_s=think))
        ready = first_s + transfer_s
        order = np.argsort(ready, kind="stable")
        prompt = whole.prompt_tokens[order]
        asked = Requests(ready[order], prompt + 1, later[order], prompt, later[order])
        _, second_s, finish = _dealt(second, profile, asked)
        done_s, streamed_s = np.empty(n), np.empty(n)
        done_s[order], streamed_s[order] = finish, second_s
        # The k-th finish of the prefill pool makes room for request clients + k, which is sent once that one is decoded.
        think[clients:] = (done_s - first_s)[np.argsort(first_s, kind="stable")[: n - clients]]
    several = whole.output_tokens > 1
    # The decode pool counts the prompt's own token as its first step, so its first result is of the second.
    held = np.clip(m.stream_interval - 2, 0, later - 1)
    shown_s = streamed_s + held * (done_s - streamed_s) / np.maximum(later - 1, 1)
    tpot = (done_s - shown_s)[several] / (whole.output_tokens - 1)[several]
    client_s = profile.request_s + profile.request_token_s * whole.prompt_tokens
    found = latency_metrics(shown_s - sent + client_s, tpot, done_s - sent + client_s, quantiles=False)
    found["output_tokens_per_s"] = (
        m.clients * m.output_tokens / (found["ttft_s"] + (m.output_tokens - 1) * found["tpot_s"])
    )
    return found


def _dealt(one: Replica, profile: EngineProfile, requests: Requests) -> tuple[NDArray[np.float64], ...]:
    """Arrival, first token and finish of requests that a pool's engines are dealt in turn. [s]

    Raises
    ------
    InfeasibleError
        If a request does not fit.
    """
    from simulator.engine.compiled import simulate  # noqa: PLC0415  # numba takes a while to import

    cost, settings = _cost(one.kernels, profile), one.settings(profile, requests)
    engines = min(one.equals, requests.concurrency or one.equals, len(requests))
    arrival, first_token, finish = np.empty((3, len(requests)))
    for k in range(engines):
        part = slice(k, None, engines)
        clients = len(range(k, requests.concurrency, engines))
        own = Requests(
            requests.arrival_s[part],
            requests.prompt_tokens[part],
            requests.output_tokens[part],
            requests.cached_tokens[part],
            requests.max_tokens[part],
            clients,
        )
        result = simulate(cost, settings, own, timeline_interval_s=TIMELINE_S)
        if not (result.status == FINISHED).all():
            raise InfeasibleError("requests do not fit into the KV cache")
        arrival[part], first_token[part], finish[part] = result.arrival_s, result.first_token_s, result.finish_s
    return arrival, first_token, finish


def transfer_s_per_token(m: Measurement, sender: Replica) -> float:
    """Time to hand one token's KV cache over, every chip sending its own over its network interface. [s]

    Raises
    ------
    UnpriceableError
        If the chip's file has no network between nodes.
    """
    chip = load_chip(m.chip)
    if chip.scale_out is None:
        raise UnpriceableError(f"{m.chip}: no network between nodes in its file, so no way from prefill to decode")
    bandwidth = chip.scale_out.bandwidth.si(f"{m.chip}: scale_out.bandwidth", "bytes/s")
    return max(sender.fit.groups.full, 1) * sender.fit.kv_bytes_per_token / bandwidth
