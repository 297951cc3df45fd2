"""Scenarios: what a person writes to have a deployment simulated.

A scenario is one TOML file with ``schema_version = 1``. ``docs/scenarios.md`` lists every field. Relative paths in a
file are relative to that file; those in ``--set`` are relative to the working folder. A resolved scenario has every
default filled in and every path absolute, so running it again gives the same result.
"""

from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from simulator.catalog.engines import load_engine
from simulator.catalog.files import data_folder, find, names_in, parse, read_toml
from simulator.catalog.overrides import assign, parse_override
from simulator.catalog.price_book import NO_PRICES, read_price_file
from simulator.catalog.records import Record
from simulator.engine.expert_skew import ExpertSkew
from simulator.engine.records import EngineSettings
from simulator.engine.scheduling import HostOverheads, Scheduling
from simulator.errors import InputError
from simulator.roofline.deployment import DEQUANTIZATION_FLOPS, WORKSPACE_BYTES
from simulator.run.clients import ClientOptions
from simulator.run.fleet_options import (
    TABLES,
    VALUES,
    AgentOptions,
    LinkOptions,
    PoolOptions,
    RouterOptions,
    StoreOptions,
)
from simulator.run.options import PriceOptions, RunOptions, SloOptions
from simulator.run.speculation import SpeculationOptions
from simulator.traffic import TrafficSpec

Fraction = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


class ShardingOptions(Record):
    """``[sharding]``: how the model lies on the slice."""

    tp: PositiveInt | None = None
    """Tensor-parallel degree; None: all chips that the other degrees leave."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    dp: PositiveInt = 1
    """Attention ranks that share the routed experts; only with ``ep``."""
    ep: PositiveInt = 1
    """Chips over which whole routed experts are spread: tp x dp, or 1."""
    overlap: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the collectives that may hide behind matrix products."""
    kv_layout: Literal["heads", "even"] = "heads"
    """``even`` spreads the KV cache without regard to heads (its exchange is not priced)."""
    layout: str = "1d"
    """Where weights are on a torus: ``1d``, ``2d``, ``gathered``, or with axes, ``2d-x``."""
    looped_exchange: bool = False
    """Whether a ``2d`` layout exchanges in pieces inside its products."""
    sequence_parallel: bool | None = None
    """Norms and residuals split over tokens; None: on a torus."""


class DeploymentOptions(Record):
    """``[deployment]``: what the datasheet and the sharding leave open about a step's cost."""

    expert_imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Busiest against mean time of routed experts."""
    expert_skew: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Mean of a factor on the routed experts' time that is drawn anew for every step."""
    expert_skew_sigma: Annotated[float, Field(ge=0, le=4)] = ExpertSkew.sigma
    """Spread of that factor: standard deviation of the logarithm of its excess over 1."""
    dequantization_flops: Annotated[float, Field(ge=0, allow_inf_nan=False)] = DEQUANTIZATION_FLOPS
    """Unpacking one weight held narrower than its products, in FLOPs of the matrix units. [FLOP]"""


class HostOptions(Record):
    """``[engine.host]``: time that the CPU adds (docs/engine-scheduling.md, H1 to H3). All in seconds."""

    step_s: Seconds = HostOverheads.step_s
    """Host work per step …"""
    sequence_s: Seconds = HostOverheads.sequence_s
    """… per scheduled request of a step …"""
    token_s: Seconds = HostOverheads.token_s
    """… and per scheduled token."""
    asynchronous: bool = HostOverheads.asynchronous
    """Host work of the next step runs during the present one (vLLM's async scheduling)."""
    request_s: Seconds = HostOverheads.request_s
    """Between a request's arrival and the scheduler's seeing it."""
    output_s: Seconds = HostOverheads.output_s
    """Between a token and its arrival at the client."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class TierOptions(Record):
    """One of ``[[engine.cache_tiers]]``: memory that keeps what the prefix cache evicts from HBM."""

    name: str = "host"
    blocks: PositiveInt | None = None
    """KV blocks it holds; or state ``capacity_bytes``."""
    capacity_bytes: PositiveFloat | None = None
    """Of the replica's share; of attention ranks, each rank's. [bytes]"""
    bandwidth_bytes_per_s: PositiveFloat | None = None
    """Of loading, the whole replica (of attention ranks: each rank); None: the chips' PCIe links together. [bytes/s]"""
    latency_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    write_through: bool = False
    """Whether blocks of prompts are put here when they are computed, and not only what HBM evicts."""


class EngineOptions(Record):
    """``[engine]``: vLLM's settings, under vLLM's names."""

    profile: str | None = None
    """Serving engine whose host times, launches and memory rule apply: a name of ``workloads/engines`` or a file. Settings that are not
    given are then that engine's."""
    max_num_seqs: PositiveInt = EngineSettings.max_num_seqs
    max_num_batched_tokens: PositiveInt = EngineSettings.max_num_batched_tokens
    gpu_memory_utilization: Fraction = 0.9
    block_size: PositiveInt = EngineSettings.block_size
    max_model_len: Annotated[int, Field(ge=0)] | None = None
    """Longest prompt + output; 0: bounded by the KV cache alone; None: the model's context length, if known."""
    scheduler_reserve_full_isl: bool = EngineSettings.scheduler_reserve_full_isl
    prefix_cache: Literal["off", "blocks", "radix"] = "off"
    """``blocks``: vLLM's cache of hashed blocks; ``radix``: SGLang's tree. Both go by the hashes that the traffic states."""
    cache_outputs: bool = EngineSettings.cache_outputs
    """Whether the prefix cache keeps blocks with output tokens."""
    rank_routing: Literal["round-robin", "least-loaded"] = "round-robin"
    """How requests are spread over attention ranks (``sharding.dp``)."""
    preemption: Literal["recompute", "swap"] = "recompute"
    """``swap``: copy the blocks of preempted requests to host memory instead of computing them again."""
    host_blocks: Annotated[int, Field(ge=0)] | None = None
    """KV blocks of host memory for them; needed by ``swap``."""
    swap_bandwidth_bytes_per_s: PositiveFloat | None = None
    """Of the whole replica (of attention ranks: of one rank); None: the chips' PCIe links together. [bytes/s]"""
    swap_overlap: bool = False
    """Whether copies run beside the step's computation."""
    cache_tiers: Annotated[tuple[TierOptions, ...], BeforeValidator(_as_tuple)] = ()
    """Memory that keeps what the prefix cache evicts, the nearest first."""
    stored_prefix_tokens: Annotated[int, Field(ge=0)] = 0
    """Leading tokens of every prompt that the last tier holds at the start, as a store that outlived the server does."""
    load_policy: Literal["always", "never", "cheaper"] = "cheaper"
    """Whether blocks in a tier are loaded or computed again."""
    policy: Literal["fcfs", "priority", "sjf", "edf", "fair"] = "fcfs"
    """Who is served next: first come, smallest class, fewest predicted tokens, earliest deadline, least-served tenant."""
    preempt_lower: bool = Scheduling.preempt_lower
    """With ``priority``: a waiting request may preempt running ones of a lower class."""
    length_prediction_sigma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """With ``sjf``: σ of the predictor's log-normal error; 0 is an oracle."""
    prompt_weight: Annotated[int, Field(ge=0)] = Scheduling.prompt_weight
    """With ``fair``: what a computed prompt token counts …"""
    output_weight: Annotated[int, Field(ge=0)] = Scheduling.output_weight
    """… and an emitted one."""
    batching: Literal["chunked", "orca", "prefill_first", "static"] = "chunked"
    """How a step is put together."""
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = Scheduling.long_prefill_token_threshold
    """Tokens of one prompt in a step at most; 0: the budget alone limits them."""
    max_num_partial_prefills: Annotated[int, Field(ge=0)] = Scheduling.max_num_partial_prefills
    """Unfinished prompts at a time at most; 0: no limit."""
    watermark: Annotated[float, Field(ge=0, lt=1)] = Scheduling.watermark
    """Share of the KV blocks that an admission must leave free."""
    host: HostOptions = HostOptions()
    disable_hybrid_kv_cache_manager: bool | None = None
    """Whether windowed layers keep the KV blocks that their window has left, like all others. None: they give them back, except where that is
    not modelled (a radix tree, tiers below the prefix cache), which sets whole windows aside or keeps all blocks, whichever holds more."""
    num_gpu_blocks_override: Annotated[int, Field(ge=2)] | None = None
    """KV blocks, the null block included, instead of what fits in memory. Memory is then not checked."""
    workspace_bytes: Annotated[float, Field(ge=0)] = WORKSPACE_BYTES
    """Memory per chip that is neither weights, activations nor KV cache. [bytes]"""
    speculation: SpeculationOptions | None = None
    """Speculative decoding; None: off."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_profile(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("profile"), str):
            return data
        profile = load_engine(data["profile"]).profile
        defaults = {
            "max_num_seqs": profile.max_num_seqs,
            "max_num_batched_tokens": profile.max_num_batched_tokens,
            "gpu_memory_utilization": profile.memory_fraction,
            "workspace_bytes": profile.workspace_bytes,
        }
        return {**defaults, **data}

    @model_validator(mode="after")
    def _swap_has_room(self) -> "EngineOptions":
        if (self.preemption == "swap") != (self.host_blocks is not None):
            raise ValueError(f'host_blocks = {self.host_blocks}: to be stated with preemption = "swap", and only then')
        return self

    @model_validator(mode="after")
    def _something_stores(self) -> "EngineOptions":
        if self.stored_prefix_tokens and not self.cache_tiers:
            raise ValueError(
                f"stored_prefix_tokens = {self.stored_prefix_tokens}: without cache_tiers nothing holds them"
            )
        return self

    @model_validator(mode="after")
    def _budget_covers_a_full_batch(self) -> "EngineOptions":
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens} is less than max_num_seqs = "
                f"{self.max_num_seqs}: a full decode batch would not fit in a step"
            )
        return self

    @property
    def scheduling(self) -> Scheduling:
        """Policy and batching as the engine takes them; InputError if they contradict each other."""
        names = Scheduling.__dataclass_fields__
        return Scheduling(**{name: getattr(self, name) for name in names})


class EfficiencyOptions(Record):
    """``[efficiency]``: what part of the datasheet is reached. ``efficiency = "ideal"`` is short for its ``base``."""

    base: Literal["default", "ideal"] = "default"
    """``default``: the chip's own, or its family's; ``ideal``: the bare datasheet, no overheads."""
    matmul: Fraction | None = None
    hbm: Fraction | None = None
    attention: Fraction | None = None
    kv: Fraction | None = None
    link: Fraction | None = None
    op_overhead_s: Seconds | None = None
    collective_latency_s: Seconds | None = None
    step_overhead_s: Seconds | None = None
    row_overhead_s: Seconds | None = None

    @property
    def overrides(self) -> dict[str, float]:
        """Values that replace those of ``base``."""
        return {k: v for k, v in self.model_dump(exclude={"base"}).items() if v is not None}


def _base_from_word(value: Any) -> Any:
    return {"base": value} if isinstance(value, str) else value


def _policy_from_word(value: Any) -> Any:
    return {"policy": value} if isinstance(value, str) else value


class Scenario(Record):
    """One deployment under one traffic, with what it is judged by."""

    schema_version: Literal[1]
    name: str
    description: str = ""
    model: str
    """Name in the catalogue, or the path of a model file or ``config.json``."""
    slice: str
    """``chip:shape``; the slice of one replica."""
    precision: str = "bf16"
    quantize_head: bool = False
    """Whether embedding and output head are held in the weights' format too."""
    replicas: PositiveInt = 1
    router: Annotated[RouterOptions, BeforeValidator(_policy_from_word)] = RouterOptions()
    pool: Annotated[tuple[PoolOptions, ...], BeforeValidator(_as_tuple)] = ()
    """Pools of replicas; none: one pool of ``replicas`` equal ones."""
    link: LinkOptions | None = None
    """Between prefill and decode pools."""
    store: StoreOptions | None = None
    """Where cached tokens' KV is fetched from; None: it is in HBM already."""
    agents: AgentOptions | None = None
    """Who sends the requests, if not the traffic by itself."""
    sharding: ShardingOptions = ShardingOptions()
    deployment: DeploymentOptions = DeploymentOptions()
    engine: EngineOptions = EngineOptions()
    efficiency: Annotated[EfficiencyOptions, BeforeValidator(_base_from_word)] = EfficiencyOptions()
    traffic: TrafficSpec
    clients: ClientOptions = ClientOptions()
    slo: SloOptions = SloOptions()
    prices: PriceOptions = PriceOptions()
    run: RunOptions = RunOptions()

    @model_validator(mode="after")
    def _pools_make_a_path(self) -> "Scenario":
        names = [pool.name for pool in self.pool]
        if len(set(names)) < len(names):
            raise ValueError(f"pool: names must differ, got {', '.join(names)}")
        roles = {pool.role for pool in self.pool}
        if len(roles) > 1 and "unified" in roles:
            raise ValueError("pool: either all are unified, or there are prefill and decode pools")
        if roles in ({"prefill"}, {"decode"}):
            raise ValueError("pool: prefill and decode pools need each other; state at least one of each")
        if self.pool and self.replicas != 1:
            raise ValueError(f"replicas = {self.replicas}: each pool states its own; leave it out beside [[pool]]")
        if (self.link is not None) != self.disaggregated:
            raise ValueError("link: to be stated with prefill and decode pools, and only then ([link] may be empty)")
        if self.agents is not None and self.traffic.arrival is not None:
            raise ValueError("traffic.arrival: agents send requests when they have their answers; leave it out")
        if self.agents is not None and self.clients.may_leave:
            raise ValueError("clients: agents wait for their answers; state agents.deadline_s instead of timeouts")
        if self.disaggregated and self.clients.may_leave:
            raise ValueError(
                "clients: timeouts and cancellations are not followed from one pool to another; leave them out"
            )
        for pool in self.pool:
            self.of_pool(pool)
        return self

    @property
    def disaggregated(self) -> bool:
        """Whether prompts are computed and answers decoded in pools of their own."""
        return any(pool.role != "unified" for pool in self.pool)

    @property
    def all_replicas(self) -> int:
        """Replicas of all pools."""
        return sum(pool.replicas for pool in self.pool) if self.pool else self.replicas

    def of_pool(self, pool: PoolOptions) -> "Scenario":
        """The scenario as one of its pools has it, alone.

        Raises
        ------
        ValueError
            If the pool states a field that there is not, or a value it cannot have; it names the pool.
        """
        own = {name: value for name in VALUES if (value := getattr(pool, name)) is not None}
        for name in TABLES:
            stated = getattr(pool, name)
            if stated:
                common = getattr(self, name)
                try:
                    data = {**common.model_dump(mode="json", exclude_unset=True), **stated}
                    own[name] = parse(type(common), data, f"pool {pool.name!r}, {name}")
                except InputError as error:
                    raise ValueError(str(error)) from None
        return self.model_copy(update={**own, "replicas": pool.replicas, "pool": (), "link": None})

    def as_toml(self) -> dict[str, Any]:
        """The resolved scenario as plain data: every value stated, unset ones left out."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        if self.prices.book == NO_PRICES:
            del data["prices"]["book"]
        return data


def scenario_names() -> list[str]:
    """Names of the scenarios that ship with the package, sorted."""
    return names_in(_folder())


def scenario_file(name_or_path: str) -> Traversable:
    """File of a scenario: a shipped name, or a path.

    Raises
    ------
    InputError
        If there is no such scenario or file.
    """
    if Path(name_or_path).is_dir() and (Path(name_or_path) / "scenario.toml").is_file():
        # A result folder: its resolved scenario.
        return Path(name_or_path) / "scenario.toml"
    return find("scenario", name_or_path, _folder())


def load_scenario(name_or_path: str, overrides: Iterable[str] = ()) -> Scenario:
    """Read a scenario and apply ``path=value`` overrides, as ``--set`` gives them.

    Parameters
    ----------
    name_or_path
        name of a shipped scenario, path of a file, or a result folder, whose resolved scenario is taken.
    overrides
        e.g. ``replicas=4``, ``engine.max_num_seqs=64``, ``traffic.trace=mine.csv``: a path of fields, and a value in
        TOML's syntax, in which a word that is no TOML value is a string. ``traffic.trace`` takes the place of the
        file's whole ``[traffic]`` table: the trace has lengths and times of its own.

    Raises
    ------
    InputError
        For an unknown scenario, field or value; the message names it, what is allowed and the nearest name.
    """
    file = scenario_file(name_or_path)
    data = read_toml(file)
    _absolute_paths(data, _parent(file))
    _inline_price_file(data, _parent(file))
    changes = [parse_override(text, example="engine.max_num_seqs=64") for text in overrides]
    _make_way_for_trace(data, [path for path, _ in changes])
    for path, value in changes:
        assign(data, path, value, short=_SHORT)
        # What an earlier file or override made absolute stays as it is.
        _absolute_paths(data, Path.cwd())
        _inline_price_file(data, Path.cwd())
    where = (
        str(file)
        if isinstance(file, Path) and file.is_file() and name_or_path not in scenario_names()
        else name_or_path
    )
    if changes:
        where += " with --set " + " ".join(".".join(path) for path, _ in changes)
    return parse(Scenario, data, where)


def _folder() -> Traversable:
    return data_folder("workloads") / "scenarios"


def _parent(file: Traversable) -> Path:
    return Path(str(file)).absolute().parent


def _make_way_for_trace(data: dict[str, Any], paths: list[list[str]]) -> None:
    """Setting ``traffic.trace`` replaces the file's traffic: which requests come, and when, is then up to the trace."""
    traffic = data.get("traffic")
    if any(path[:2] == ["traffic", "trace"] for path in paths) and isinstance(traffic, dict) and "trace" not in traffic:
        data["traffic"] = {}


#: Tables that a file may write as one word, and the field that the word is short for.
_SHORT = {"efficiency": "base", "router": "policy", "traffic.trace": "file"}


def _absolute_paths(data: dict[str, Any], base: Path) -> None:
    """Make the file names in a scenario absolute: the models', the chips', the profile's, the mix's and the trace's."""
    traffic, engine = data.get("traffic"), data.get("engine")
    drafting = engine.get("speculation") if isinstance(engine, dict) else None
    pools = data.get("pool")
    for table in (data, drafting, *(pools if isinstance(pools, list | tuple) else ())):
        if isinstance(table, dict):
            _absolute_model_and_slice(table, base)
    profile = engine.get("profile") if isinstance(engine, dict) else None
    if isinstance(profile, str) and (profile.endswith(".toml") or "/" in profile):
        data["engine"] = {**data["engine"], "profile": _absolute(profile, base)}
    if not isinstance(traffic, dict):
        return
    mix, trace = traffic.get("mix"), traffic.get("trace")
    if isinstance(mix, str) and (mix.endswith(".toml") or "/" in mix):
        traffic["mix"] = _absolute(mix, base)
    if isinstance(trace, str):
        traffic["trace"] = _absolute(trace, base)
    elif isinstance(trace, dict) and isinstance(trace.get("file"), str):
        trace["file"] = _absolute(trace["file"], base)


def _inline_price_file(data: dict[str, Any], base: Path) -> None:
    """Put the contents of ``prices.file`` where its name was, so that the scenario says all that it needs."""
    prices = data.get("prices")
    if isinstance(prices, dict) and isinstance(prices.get("file"), str):
        book = read_price_file(_absolute(prices["file"], base))
        data["prices"] = {**{k: v for k, v in prices.items() if k != "file"}, "book": book}


def _absolute_model_and_slice(table: dict[str, Any], base: Path) -> None:
    model, sliced = table.get("model"), table.get("slice")
    if isinstance(model, str) and (model.endswith((".toml", ".json")) or "/" in model):
        table["model"] = _absolute(model, base)
    if isinstance(sliced, str):
        chip, colon, shape = sliced.rpartition(":")
        if chip.endswith(".toml") or "/" in chip:
            table["slice"] = f"{_absolute(chip, base)}{colon}{shape}"


def _absolute(text: str, base: Path) -> str:
    # An absolute path stays itself when joined to a base.
    return str(base / Path(text).expanduser())
