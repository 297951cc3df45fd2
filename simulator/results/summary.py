"""The summary of a run: one validated record, every field with its unit in the name and its meaning beside it.

Figures are of two kinds. *Accounting* figures (chip-seconds, prices, energy, utilisation) cover the whole run, so that
they add up: Σ busy + idle = chips × time. *Statistical* figures (latency, throughput, goodput, occupancy) cover the
measured window: requests that arrived after the warm-up cut and before the drain cut.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

#: Version of the result schema; a change of meaning, name or unit raises it.
SCHEMA_VERSION = 2

Status = Literal["ok", "overloaded", "slo_missed", "partial"]


class Section(BaseModel):
    """Base of the summary's records."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Estimate(Section):
    """One figure estimated from a sample, with its sampling interval."""

    value: float | None
    """The estimate; null when there is nothing to estimate it from."""
    low: float | None = None
    """Lower end of the 95 % batch-means interval."""
    high: float | None = None
    """Upper end."""
    reason: str = ""
    """Why the interval (or the value) is missing."""


class Distribution(Section):
    """A latency over the measured requests."""

    n: int
    """Values it was computed from."""
    mean: Estimate
    p50: Estimate
    p90: Estimate
    p95: Estimate
    p99: Estimate


class Latency(Section):
    """What users see. All in seconds."""

    ttft_s: Distribution
    """Time to first token."""
    tpot_s: Distribution
    """Time per output token after the first; requests with one output token have none."""
    itl_s: Distribution
    """Inter-token latency: one value per token after a request's first, in the steps that start inside the measured window (in
    a closed loop, or when everything arrives at once, in the whole run), each within 0.4 %."""
    itl_pass_s: Distribution | None = None
    """With speculative decoding: one value per pass, whose tokens come together; ``itl_s`` then has zeros. Null without."""
    e2e_s: Distribution
    """Arrival to last token."""
    queue_s: Distribution
    """Arrival to first step."""
    one_token_outputs: int
    """Measured requests without a TPOT."""


class Requests(Section):
    """Where every request ended; arrived = finished + running + waiting + rejected + timed out + cancelled."""

    total: int
    """Requests in the stream."""
    arrived: int
    finished: int
    running: int
    waiting: int
    rejected: int
    timed_out: int = 0
    cancelled: int = 0
    retries: int = 0
    """Attempts after the first."""
    not_arrived: int
    """In a closed loop that ended before they were released."""
    measured: int
    """Finished requests that arrived inside the measured window."""
    preemptions: int
    preempted: int
    """Requests preempted at least once."""
    prompt_tokens: int
    """Of finished requests, cached tokens included."""
    cached_tokens: int
    """Of finished requests: leading tokens they did not compute, stated as cached or found in the prefix cache."""
    output_tokens: int
    recomputed_tokens: int


class Window(Section):
    """The measured window: requests arriving in [start_s, stop_s] count in the statistical figures."""

    start_s: float
    """Warm-up cut."""
    stop_s: float
    """Drain cut: later arrivals, which an emptying system serves faster, are left out."""
    last_arrival_s: float
    end_s: float
    """Clock at the end of the run: the last replica's last step."""
    rule: str
    """The cut rules in words."""


class Load(Section):
    """How far the deployment is from its capacity."""

    arrival_per_s: float | None
    """Mean arrival rate; null for a closed loop or a batch that arrives at once."""
    capacity_per_s: float
    """Throughput of the same requests all queued at t = 0."""
    capacity_understated: bool
    """Fewer requests than ten full batches: the emptying at the end of the capacity run weighs on it."""
    load: float | None
    """arrival_per_s ÷ capacity_per_s."""
    headroom_fraction: float | None
    """1 − load: negative when overloaded."""
    backlog_start: float
    """Waiting requests at the start of the measured window (mean over its first twentieth)."""
    backlog_end: float
    """Waiting requests at its end (mean over its last twentieth)."""
    backlog_trend_p: float | None
    """One-sided p-value of the Mann–Kendall test for a growing backlog over 20 batch means; null if it has no sample."""
    backlog_growing: bool
    """backlog_trend_p below the stated level, and the backlog grew by more than one request per replica."""
    overloaded: bool
    """load ≥ 1 (and, with capacity_understated, requests still waiting at the end), or backlog_growing."""


class Slo(Section):
    """Service-level objectives and how far they were met."""

    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    target_fraction: float
    """Share of requests that must meet all limits."""
    met_fraction: Estimate
    """Share that met all limits; rejected and unfinished requests count as missed."""
    met: bool
    goodput_per_s: float
    """Requests per second that met all limits."""


class Throughput(Section):
    """Rates in the measured window."""

    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt (cached included) and output tokens."""
    requests_per_s_per_chip: float
    output_tokens_per_s_per_chip: float
    total_tokens_per_s_per_chip: float
    output_tokens_per_s_per_user: float | None
    """1 ÷ median TPOT."""


class Occupancy(Section):
    """How full the replicas were."""

    mean_running: float
    """Running requests per replica, mean over the measured window."""
    mean_waiting: float
    """Waiting requests per replica, mean over the measured window."""
    mean_decode_batch: float
    """Decoding sequences per step, mean over steps of the whole run."""
    mean_step_tokens: float
    """Tokens per step, mean over steps of the whole run."""
    mean_kv_fraction: float
    """KV blocks in use ÷ KV blocks, mean over the measured window."""
    peak_kv_fraction: float
    """Largest over the whole run, of any replica."""
    peak_running: int
    peak_waiting: int
    kv_capacity_tokens: int
    """Of one replica."""
    steps: int
    mean_step_s: float


class Utilisation(Section):
    """Model FLOPs and bytes against the peaks, over the whole run."""

    mfu: float
    """Model FLOPs (no recomputation) ÷ (peak FLOP/s × chip time)."""
    mbu: float
    """Bytes that crossed HBM by the cost model ÷ (peak bandwidth × chip time)."""
    mfu_busy: float
    """mfu over busy time alone."""
    mbu_busy: float
    busy_fraction: float
    """Σ busy ÷ (chips × time)."""
    model_flops: float
    recomputed_flops: float
    """FLOPs spent a second time after preemptions, and on attempts that timed out or were cancelled."""
    hbm_bytes: float
    speculative_flops: float = 0.0
    """FLOPs of drafting, and of verifying drafts that were rejected."""


class PrefixCache(Section):
    """What the prefix cache found, counted whenever a request is admitted (again, after a preemption)."""

    kind: str
    """blocks: vLLM's cache of hashed blocks; radix: SGLang's tree of prefixes."""
    queried_tokens: int
    """Tokens known of the requests admitted."""
    hit_tokens: int
    """Of these, found in the cache."""
    hit_fraction: float
    """hit_tokens ÷ queried_tokens."""
    evicted_blocks: int
    """Cached blocks given up to make room."""
    saved_chip_s: float
    """What computing the hits would have taken in full steps: what a replica at its capacity gets back. Below it, fewer prompt
    tokens ride along with decodes in steps that take place anyway, and less is saved."""
    saved_busy_fraction: float
    """saved_chip_s ÷ the chip-seconds the run was busy."""


class Speculation(Section):
    """What speculative decoding did, over the whole run."""

    method: str
    draft_tokens: int
    """Most drafts on one path."""
    tokens_per_pass: float
    """Tokens emitted ÷ passes of single sequences."""
    drafts_per_pass: float
    """Drafts verified ÷ passes."""
    accepted_fraction: float | None
    """Drafts accepted ÷ verified; null if none were."""
    passes_without_drafts_fraction: float
    """Share of the passes that drafted nothing, because their batch was too large."""
    drafted_tokens: int
    rejected_tokens: int
    """Drafts not accepted, or not wanted any more at a request's end."""
    draft_share_of_busy: float
    """Time of drafting ÷ busy time."""
    wasted_chip_s_per_query: float
    """Part of busy chip-seconds: drafting and verifying drafts that were rejected."""
    wasted_share_of_busy: float


class CacheTier(Section):
    """One tier of memory below HBM that keeps what the prefix cache evicts."""

    name: str
    hit_tokens: int
    """Tokens loaded from it instead of being computed."""
    stored_bytes: float
    """Moved into it."""
    loaded_bytes: float
    """Loaded from it."""


class KvMemory(Section):
    """What happened to KV blocks outside of HBM."""

    swap_out_bytes: float
    """Of preempted requests, copied to host memory."""
    swap_in_bytes: float
    """Copied back."""
    swap_fallbacks: int
    """Preempted requests that found host memory full and were computed again."""
    swap_time_fraction: float
    """Share of the busy time by which copies lengthened steps."""
    tiers: list[CacheTier]
    """The nearest first."""
    loads: int
    """Requests that loaded blocks from the tiers."""
    loads_declined: int
    """Requests that computed blocks again although a tier held them."""
    mean_load_s: float | None
    """Time a load took, from its request on; null without one."""


class ChipSeconds(Section):
    """Chip-seconds per query, three kinds, never mixed; over all finished queries of the whole run."""

    ideal: float
    """The query alone at efficiency 1: its prefill, plus output × step(B̄)/B̄ at the mean decode batch B̄."""
    busy: float
    """Its share of the steps it rode in."""
    provisioned: float
    """Fleet chips × time ÷ queries, idle included."""
    ideal_share_of_provisioned: float
    """ideal ÷ provisioned."""
    prefill: float
    """Part of busy: prefill chunks, recomputation included."""
    cached: float
    """Part of prefill: reading cached tokens."""
    recompute: float
    """Part of busy: tokens computed again after a preemption."""
    wasted: float = 0.0
    """Part of busy: attempts that timed out or were cancelled, of finished and unfinished queries."""
    decode: float
    """Part of busy: busy − prefill."""
    busy_of_measured: Distribution
    """Busy chip-seconds from query to query, over the measured requests."""


class TokenPrices(Section):
    """Prices on one basis. USD."""

    per_query_usd: float
    per_million_input_tokens_usd: float | None
    """Input tokens that were not cached; null if there were none."""
    per_million_cached_tokens_usd: float | None
    per_million_output_tokens_usd: float | None
    per_million_tokens_usd: float | None
    """All tokens together."""


class Prices(Section):
    """What a query costs."""

    usd_per_chip_hour: float
    low_usd_per_chip_hour: float | None
    """Low end of the price's range; null where its source states none."""
    high_usd_per_chip_hour: float | None
    term: str
    """on-demand, reserved-1y, reserved-3y, spot, capacity-block, market, owned, or by hand."""
    source: str
    """Where the price comes from, with its date."""
    owned: dict[str, float]
    """Parts of an owned chip's hour, which sum to its price: capital, maintenance, hosting, electricity; empty for rented chips."""
    usage: TokenPrices
    """Busy chip-seconds only: what the query used."""
    allocation: TokenPrices
    """Idle time included, in proportion to use: what the fleet costs, divided over its queries."""


class Energy(Section):
    """Energy and carbon from a linear power model; ``facility`` figures include servers and the building."""

    mean_power_w_per_chip: float
    joules_per_query: float
    """Chips only, idle time included."""
    low_joules_per_query: float
    """The same on the line between the low ends of idle and peak power."""
    high_joules_per_query: float
    """The same with peak power whenever a chip is busy, and the high ends."""
    joules_per_query_busy: float
    """Chips only, without the energy of idle time."""
    joules_per_output_token: float | None
    facility_joules_per_query: float
    """(Chips + host_power_w × provisioned chip time) × pue."""
    gco2_per_query: float
    """Grams of CO2 equivalent, operational, on the grid's average: facility energy × gco2_per_kwh."""
    usd_per_query: float | None
    """Facility energy × price of electricity; null unless the scenario says whose electricity is paid."""
    grade: str
    """How well idle and peak power are known, A (both measured) to D (peak recalled or assumed)."""
    pue: float
    """Facility energy ÷ IT energy."""
    gco2_per_kwh: float
    region: str
    """Whose grid."""
    operator: str
    """Whose building."""
    idle_power_w: float
    peak_power_w: float
    host_power_w: float
    """The chip's share of its server, always on; assumed."""
    source: str


class Breakdown(Section):
    """Where the chip time went: shares of chips × time that sum to 1."""

    fractions: dict[str, float]
    """Parts of the dense layers, head, attention_prefill, attention_decode, host (work that delayed steps), idle."""


class Ledger(Section):
    """Conservation of chip time: busy + idle = chips × time, asserted to 1e-9 relative on every run."""

    chips: int
    """Of the fleet."""
    replicas: int
    time_s: float
    chip_s: float
    """chips × time."""
    busy_chip_s: float
    idle_chip_s: float
    relative_error: float


class Figure(Section):
    """One figure over replications with different seeds."""

    mean: float
    low: float | None
    """Lower end of the 95 % Student interval of the mean between seeds."""
    high: float | None
    n: int
    """Seeds that gave the figure."""


class Replications(Section):
    """Between-seed intervals."""

    seeds: list[int]
    statuses: dict[str, int]
    """How many seeds ended in each status."""
    figures: dict[str, Figure]
    """Summary path to figure."""


class ParameterInterval(Section):
    """One figure over draws of what calibration leaves uncertain; every draw serves the same requests."""

    value: float
    """The run's own figure, at the parameters as fitted or stated."""
    low: float | None
    """Lower end of the central interval."""
    median: float | None
    """Of the draws."""
    high: float | None
    """Upper end."""
    reason: str = ""
    """Why an end is missing."""
    shares: dict[str, float] = {}
    """Source to its share of the variance of the figure's logarithm, each drawn alone; empty where nothing moves."""


class Intervals(Section):
    """Uncertainty of the model's parameters, apart from the sampling intervals of ``latency``."""

    level: float
    """Share of draws inside each interval, as a fraction."""
    draws: int
    draws_per_source: int
    """Draws of one source alone, for ``shares``."""
    sources: list[str]
    """What was drawn: kernels, profile, assumed, residual (docs/intervals.md)."""
    overloaded_fraction: float
    """Share of draws without a steady state; their latencies count as unbounded, their goodput as none."""
    infeasible_fraction: float
    """Share of draws in which the model or its requests did not fit; they count as overloaded."""
    figures: dict[str, ParameterInterval]
    """Summary path to interval."""
    notes: list[str]
    """What the intervals do not hold."""


class Assumption(Section):
    """An input that is not a measurement of this deployment."""

    what: str
    value: str
    kind: str
    """datasheet, measured, derived, assumed or recalled."""
    source: str


class Deployment(Section):
    """What was run, resolved."""

    model: str
    slice: str
    """Of several pools, each with its number of replicas."""
    chip: str
    chips_per_replica: int | None
    """Null, as the other numbers, where pools differ in it."""
    replicas: int
    """Of all pools."""
    router: str = "round-robin"
    """Who chose a replica; where pools are disaggregated, for prefill and for decode."""
    precision: str
    sharding: str
    num_kv_blocks: int | None
    block_size: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    traffic: str


class Pool(Section):
    """One pool of a fleet of several: what it is, and how it was used."""

    name: str
    role: str
    """unified, prefill or decode."""
    first_replica: int
    """Its replicas are numbered from here."""
    requests: int
    """That it finished its part of."""
    deployment: Deployment
    occupancy: Occupancy
    utilisation: Utilisation
    prefix_cache: PrefixCache | None = None
    """Null without one."""
    busy_chip_s: float
    idle_chip_s: float


class LinkUse(Section):
    """Links of one kind, over the whole run."""

    name: str
    """link: from prefill to decode replicas; store: from the store of cached KV."""
    links: int
    bandwidth_bytes_per_s: float
    """Of each."""
    latency_s: float
    transfers: int
    moved_bytes: float
    """That requests moved."""
    busy_fraction: float
    """Share of the run that a link was sending, mean over the links."""
    mean_wait_s: float
    """Time a transfer waited for its links."""
    mean_transfer_s: float
    """Waiting, sending and latency together."""


class Agents(Section):
    """What agents got done."""

    agents: int
    tasks: int
    """Started."""
    completed: int
    """All turns of which were answered, within the deadline if there is one."""
    left: int
    """Whose rest was left because the deadline had passed."""
    tasks_per_s: float
    """Completed, over the whole run."""
    task_s: Distribution
    """From a completed task's first request to its last answer; over the whole run, without intervals."""


class Summary(Section):
    """Everything a run says in one record."""

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    scenario: str
    seed: int
    status: Status
    """ok; overloaded (load ≥ 1 or a growing backlog: no steady state); partial (some requests were rejected or did
    not finish); slo_missed."""
    deployment: Deployment
    requests: Requests
    window: Window
    load: Load
    latency: Latency | None
    """Null when overloaded: there is no steady state to describe."""
    slo: Slo | None
    """Null when the scenario sets no limits, when overloaded, or when no request was measured."""
    throughput: Throughput
    occupancy: Occupancy
    utilisation: Utilisation
    prefix_cache: PrefixCache | None = None
    """Null without a prefix cache."""
    speculation: Speculation | None = None
    """Null without speculative decoding."""
    kv_memory: KvMemory | None = None
    """Null where KV blocks live in HBM alone."""
    pools: list[Pool] = []
    """Empty where there is but one, of unified replicas."""
    links: list[LinkUse] = []
    """Empty where KV caches cross none."""
    agents: Agents | None = None
    """Null without agents."""
    chip_seconds_per_query: ChipSeconds
    prices: Prices | None
    """Null when the chip has no price and the scenario sets none."""
    energy: Energy | None
    """Null when the chip's power is not published."""
    breakdown: Breakdown
    ledger: Ledger
    replications: Replications | None = None
    intervals: Intervals | None = None
    """Null unless asked for (``run.interval``)."""
    warnings: list[str] = []
    assumptions: list[Assumption] = []
