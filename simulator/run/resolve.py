"""A scenario turned into what the engine and the summary need: cost tables, settings, prices, and their sources."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from simulator.catalog.architecture import Architecture, MoEFFN
from simulator.catalog.chips import IDEAL, ChipSpec, Efficiency
from simulator.catalog.engines import EngineProfile, load_engine
from simulator.catalog.models import load_model
from simulator.catalog.records import Quantity
from simulator.catalog.slices import Slice, resolve_slice
from simulator.economics import (
    ChipPrice,
    PowerModel,
    Site,
    chip_price,
    power_model,
    price_by_hand,
    quotes,
    resolve_site,
)
from simulator.engine.expert_skew import EVEN, ExpertSkew
from simulator.engine.records import EngineSettings
from simulator.engine.scheduling import HostOverheads
from simulator.errors import InfeasibleError, InputError
from simulator.results.summary import Assumption
from simulator.results.summary import Deployment as DeploymentLabel
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.engine_profile import KernelCost, apply_profile, kernel_cost, profile_kv_blocks
from simulator.roofline.kv_groups import KvGroups
from simulator.roofline.memory import memory_fit, require_fit
from simulator.roofline.pipeline import ShardedDeployment, require_sharded_fit, shard
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.precision import parse_precision
from simulator.roofline.sharded_cost import compile_sharded
from simulator.roofline.sharding import Sharding
from simulator.roofline.step_cost import StepCost
from simulator.run.kv_memory import KvPlace, block_bytes, cache_tier, host_swap
from simulator.run.scenario import EfficiencyOptions, EngineOptions, Scenario
from simulator.run.speculation import ResolvedSpeculation, assumptions_of, resolve_speculation
from simulator.run.summarise import Facts


@dataclass(frozen=True)
class Resolved:
    """A scenario's deployment, ready to run."""

    scenario: Scenario
    architecture: Architecture
    """The whole model; that of ``deployment`` may be a stage's."""
    slice: Slice
    sharding: Sharding
    deployment: Deployment
    """Of one attention rank, or of the first pipeline stage."""
    settings: EngineSettings
    engine_cost: StepCost | PipelineCost
    """What the engine runs on."""
    cost: StepCost
    """The same as one table: of a pipeline, the sum of its stages."""
    speculation: ResolvedSpeculation | None
    site: Site
    price: ChipPrice | None
    power: PowerModel | None
    place: KvPlace
    lay: Callable[..., tuple[Deployment, ShardedDeployment | None]]
    """Lays the model on the slice again, with other settings."""
    ideal: Callable[[], StepCost]
    """Gives :attr:`ideal_cost`, which is compiled when it is first asked for."""
    profile: EngineProfile | None = None
    """What the engine adds to its kernels; None: nothing but the chip's constants."""
    kernels: KernelCost | None = None
    """What ``profile`` is applied to; None without one."""

    @property
    def ideal_cost(self) -> StepCost:
        """The same deployment with every efficiency at 1 and no overheads."""
        return self.ideal()

    def demand_plain(self, what: str) -> None:
        """Refuse what only a replica of one part can do.

        Raises
        ------
        InputError
            For ranks, stages or uneven experts.
        """
        if self.cost.parts > 1 or self.settings.expert_skew.on:
            text = "uneven experts (deployment.expert_skew)" if self.cost.parts == 1 else f"sharding {self.sharding}"
            raise InputError(f"{self.scenario.name}: {what} follows replicas of one part with even experts, not {text}")


def resolve(scenario: Scenario, *, architecture: Architecture | None = None) -> Resolved:
    """Load, check and compile a scenario's deployment.

    Parameters
    ----------
    architecture
        the model itself, in place of the one that ``scenario.model`` names.

    Raises
    ------
    InputError
        If a name is unknown or two fields contradict each other.
    UnpriceableError
        If the cost model cannot price the model yet.
    InfeasibleError
        If the model does not fit on the slice.
    """
    return _resolve(scenario, _profile(scenario.engine), architecture=architecture)


def redraw(resolved: Resolved, efficiency: Efficiency, profile: EngineProfile | None) -> Resolved:
    """The same scenario at other efficiencies and with another profile's values.

    Raises
    ------
    InfeasibleError
        If the model does not fit under the profile.
    """
    return _resolve(
        resolved.scenario, profile, architecture=resolved.architecture, efficiency=efficiency, like=resolved
    )


def _resolve(
    scenario: Scenario,
    profile: EngineProfile | None,
    *,
    architecture: Architecture | None,
    efficiency: Efficiency | None = None,
    like: Resolved | None = None,
) -> Resolved:
    """Resolve at the scenario's efficiencies, or at others; ``like`` has what does not depend on them."""
    engine = scenario.engine
    a_slice = resolve_slice(scenario.slice) if like is None else like.slice
    site = site_of(scenario) if like is None else like.site
    price = _price(scenario, a_slice.chip, site) if like is None else like.price
    sharding = _sharding(scenario, a_slice)
    model = architecture or load_model(scenario.model)
    lay = partial(
        _lay,
        sharding,
        model,
        a_slice,
        precision=parse_precision(scenario.precision, quantize_head=scenario.quantize_head),
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        workspace_bytes=engine.workspace_bytes,
        decode_tokens=1 if engine.speculation is None else engine.speculation.decode_tokens,
        windowed_kv=_windowed_kv(scenario),
        overlap=scenario.sharding.overlap,
        kv_layout=scenario.sharding.kv_layout,
        sequence_parallel=scenario.sharding.sequence_parallel,
        layout=scenario.sharding.layout,
        looped_exchange=scenario.sharding.looped_exchange,
        expert_imbalance=scenario.deployment.expert_imbalance,
        dequantization_flops=scenario.deployment.dequantization_flops,
    )
    deployment, sharded = lay(efficiency=efficiency or _efficiency(scenario.efficiency, a_slice.chip))
    if profile is not None and sharded is not None:
        raise InputError(
            f"{scenario.name}: engine.profile = {engine.profile!r} with sharding {sharding}: profiles describe replicas of one "
            "part; leave one of them out"
        )
    blocks = _kv_blocks(scenario, deployment, sharded, profile)
    kernels = None
    if profile is None:
        cost = _compile(deployment, sharded)
    else:
        kernels = _kernels(deployment, profile, like)
        cost = apply_profile(kernels, profile)
    drafting = None
    if engine.speculation is not None:
        if isinstance(cost, PipelineCost):
            raise InputError(
                f"{scenario.name}: engine.speculation with sharding {sharding}: the next drafts need the last stage's verdict on the "
                "present ones, and vLLM 0.19 does not compose the two either; leave one of them out"
            )
        if profile is not None:
            raise InputError(
                f"{scenario.name}: engine.speculation and engine.profile = {profile.name!r}: what an engine adds to a step was "
                "measured without drafts; leave one of them out"
            )
        drafting = resolve_speculation(
            engine.speculation, deployment, cost, check_memory=engine.num_gpu_blocks_override is None
        )
        cost = drafting.with_other_slice(cost)
        blocks = drafting.fit.kv_blocks if engine.num_gpu_blocks_override is None else blocks
    place = KvPlace.of(deployment, sharded, drafting.fit if drafting else None)
    length = deployment.architecture.context_length if engine.max_model_len is None else engine.max_model_len
    settings = EngineSettings(
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        block_size=engine.block_size,
        num_kv_blocks=blocks,
        max_model_len=length or 0,
        scheduler_reserve_full_isl=engine.scheduler_reserve_full_isl,
        prefix_cache=engine.prefix_cache,
        cache_outputs=engine.cache_outputs,
        rank_routing=engine.rank_routing,
        expert_skew=_expert_skew(scenario),
        speculation=drafting.plan if drafting else None,
        scheduling=engine.scheduling,
        host=HostOverheads(**engine.host.model_dump()),
        retries=scenario.clients.retries,
        swap=host_swap(place, engine),
        tiers=tuple(cache_tier(place, tier) for tier in engine.cache_tiers),
        load_policy=engine.load_policy,
        kv_groups=drafting.fit.groups if drafting else _groups(deployment, sharded),
    )
    return Resolved(
        scenario=scenario,
        architecture=model,
        slice=a_slice,
        sharding=sharding,
        deployment=deployment,
        settings=settings,
        engine_cost=cost,
        cost=_one_table(cost),
        speculation=drafting,
        site=site,
        price=price,
        place=place,
        power=_power(scenario, a_slice.chip) if like is None else like.power,
        lay=lay,
        ideal=_ideal(lay) if like is None else like.ideal,
        profile=profile,
        kernels=kernels,
    )


def with_limits(resolved: Resolved, scenario: Scenario) -> Resolved:
    """The deployment of ``scenario``, which differs from ``resolved`` in its batch limits, and has none that are larger.

    The tables, which cover more steps than it takes, are kept; memory is looked at again.

    Raises
    ------
    InputError
        If a limit is larger than those of ``resolved``, or with speculative decoding, whose plan depends on the limits.
    InfeasibleError
        If the model does not fit on the slice.
    """
    engine, had = scenario.engine, resolved.settings
    if engine.max_num_seqs > had.max_num_seqs or engine.max_num_batched_tokens > had.max_num_batched_tokens:
        raise InputError(
            f"{scenario.name}: limits of {engine.max_num_seqs} sequences and {engine.max_num_batched_tokens} tokens are beyond "
            f"the tables of {had.max_num_seqs} and {had.max_num_batched_tokens}"
        )
    if resolved.speculation is not None:
        raise InputError(f"{scenario.name}: engine.speculation: resolve the scenario anew for other batch limits")
    changes: dict[str, Any] = {
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
    }
    lay = partial(resolved.lay, **changes)
    deployment, sharded = lay(efficiency=resolved.deployment.efficiency)
    blocks = _kv_blocks(scenario, deployment, sharded, resolved.profile)
    settings = replace(had, **changes, num_kv_blocks=blocks)
    return replace(resolved, scenario=scenario, deployment=deployment, settings=settings, lay=lay, ideal=_ideal(lay))


def _ideal(lay: Callable[..., tuple[Deployment, ShardedDeployment | None]]) -> Callable[[], StepCost]:
    """The table of a deployment with every efficiency at 1, compiled once, when it is asked for."""
    return cache(lambda: _one_table(_compile(*lay(efficiency=IDEAL))))


def _windowed_kv(scenario: Scenario) -> str:
    """Where the KV of windowed layers is: what vLLM does, as far as it is modelled beside the scenario's other settings.

    Raises
    ------
    InputError
        If the scenario asks for what is not modelled.
    """
    engine = scenario.engine
    asked = engine.disable_hybrid_kv_cache_manager
    if asked:
        return "kept"
    beside = 'engine.prefix_cache = "radix"' if engine.prefix_cache == "radix" else ""
    if engine.cache_tiers:
        beside = "engine.cache_tiers"
    if beside and asked is False:
        raise InputError(
            f"{scenario.name}: engine.disable_hybrid_kv_cache_manager = false: windowed layers that give blocks back are not modelled "
            f"with {beside}; leave one of them out"
        )
    return "reserved" if beside else "pooled"


def _groups(deployment: Deployment, sharded: ShardedDeployment | None) -> KvGroups:
    """How many KV blocks the tokens of a sequence take."""
    return (memory_fit(deployment) if sharded is None else sharded.memory).groups


def _kv_blocks(
    scenario: Scenario, deployment: Deployment, sharded: ShardedDeployment | None, profile: EngineProfile | None
) -> int:
    """KV blocks of a replica that must fit, without the null block, which no request gets."""
    engine = scenario.engine
    if engine.num_gpu_blocks_override is not None:
        return engine.num_gpu_blocks_override - 1
    if sharded is not None:
        return require_sharded_fit(sharded).kv_blocks
    if profile is None:
        return require_fit(deployment).kv_blocks
    require_fit(deployment)
    blocks = profile_kv_blocks(deployment, profile)
    if blocks < 1:
        raise InfeasibleError(
            f"{scenario.name}: {deployment.architecture.name} leaves no KV cache on {deployment.slice.spec} under "
            f"engine.profile {profile.name} with engine.gpu_memory_utilization = {engine.gpu_memory_utilization}"
        )
    return blocks


def _kernels(deployment: Deployment, profile: EngineProfile, like: Resolved | None) -> KernelCost:
    """Kernels under a profile; what ``like`` has is taken over as far as it is the same."""
    skew = _skew(deployment, profile)
    known = like.kernels if like and like.profile and _skew(deployment, like.profile) == skew else None
    if known is not None and like is not None and like.deployment.eff is deployment.eff:
        return known
    return kernel_cost(deployment, kernels=profile.kernels, routing_skew=skew, bounds_of=known)


def _skew(deployment: Deployment, profile: EngineProfile) -> float:
    """How unevenly experts are chosen; 0 where there are none."""
    experts = any(isinstance(group.ffn, MoEFFN) for group in deployment.architecture.layers)
    return profile.routing_skew if experts else 0.0


def _sharding(scenario: Scenario, a_slice: Slice) -> Sharding:
    options = scenario.sharding
    if options.dp == 1 and scenario.engine.rank_routing != "round-robin":
        raise InputError(
            f"{scenario.name}: engine.rank_routing = {scenario.engine.rank_routing!r} spreads requests over attention ranks, and "
            "sharding.dp = 1"
        )
    if options.dp > 1 and options.ep == 1:
        raise InputError(
            f"{scenario.name}: sharding.dp = {options.dp} without ep makes independent replicas: write the slice of one, and "
            f"replicas = {options.dp * scenario.replicas}; attention ranks that share experts need sharding.ep = tp x dp"
        )
    tp = options.tp
    if tp is None:
        tp = a_slice.n_chips // (options.pp * options.dp) or 1
    return Sharding(tp=tp, pp=options.pp, dp=options.dp, ep=options.ep)


def _expert_skew(scenario: Scenario) -> ExpertSkew:
    options = scenario.deployment
    if options.expert_skew == 1:
        return EVEN
    return ExpertSkew(options.expert_skew, options.expert_skew_sigma, seed=scenario.run.seed)


def _lay(
    sharding: Sharding, architecture: Architecture, slice_: Slice, **settings: Any
) -> tuple[Deployment, ShardedDeployment | None]:
    """Lay a model on a slice: its first part, and the whole unless tensor parallelism is all there is."""
    if sharding.pp == sharding.ep == 1:
        return Deployment(architecture=architecture, slice=slice_, tp=sharding.tp, **settings), None
    sharded = shard(architecture, slice_, sharding, **settings)
    return sharded.stages[0], sharded


def _compile(deployment: Deployment, sharded: ShardedDeployment | None) -> StepCost | PipelineCost:
    return compile_step_cost(deployment) if sharded is None else compile_sharded(sharded)


def _one_table(cost: StepCost | PipelineCost) -> StepCost:
    return cost.total if isinstance(cost, PipelineCost) else cost


def _profile(engine: EngineOptions) -> EngineProfile | None:
    """The engine's profile under the scenario's own memory settings."""
    if engine.profile is None:
        return None
    profile = load_engine(engine.profile).profile
    return replace(profile, memory_fraction=engine.gpu_memory_utilization, workspace_bytes=engine.workspace_bytes)


def _efficiency(options: EfficiencyOptions, chip: ChipSpec) -> Efficiency:
    return (IDEAL if options.base == "ideal" else chip.efficiency).override(**options.overrides)


def facts(resolved: Resolved, *, seed: int, traffic: str, notes: tuple[str, ...] = ()) -> Facts:
    """What a summary says about the deployment besides the run itself.

    Parameters
    ----------
    traffic
        where arrivals and lengths come from, in words.
    notes
        remarks on the traffic that a reader of the results should know.
    """
    scenario, d = resolved.scenario, resolved.deployment
    chip = d.slice.chip
    return Facts(
        scenario=scenario.name,
        seed=seed,
        deployment=DeploymentLabel(
            model=d.architecture.name,
            slice=resolved.slice.spec,
            chip=chip.name,
            chips_per_replica=resolved.cost.chips,
            replicas=scenario.replicas,
            router=scenario.router.policy,
            precision=d.precision.name,
            sharding=_sharding_text(resolved.sharding),
            num_kv_blocks=resolved.settings.num_kv_blocks,
            block_size=resolved.settings.block_size,
            max_num_seqs=resolved.settings.max_num_seqs,
            max_num_batched_tokens=resolved.settings.max_num_batched_tokens,
            traffic=traffic,
        ),
        cost=resolved.cost,
        ideal_cost=resolved.ideal_cost,
        settings=resolved.settings,
        kv_block_bytes=block_bytes(resolved.place),
        slo=scenario.slo,
        options=scenario.run,
        speculation_method=scenario.engine.speculation.method if scenario.engine.speculation else "",
        price=resolved.price,
        power=resolved.power,
        site=resolved.site,
        pays_electricity=scenario.prices.wants_electricity,
        assumptions=tuple(_assumptions(resolved)),
        notes=(*d.notes, *notes),
    )


def _sharding_text(sharding: Sharding) -> str:
    degrees = {name: degree for name, degree in vars(sharding).items() if degree > 1 or name == "tp"}
    return " ".join(f"{name}={degree}" for name, degree in degrees.items())


def _price(scenario: Scenario, chip: ChipSpec, site: Site) -> ChipPrice | None:
    """Price of a chip: by hand, under the scenario's term, or the first quote; None if there is none and none was asked for."""
    prices = scenario.prices
    if prices.usd_per_chip_hour is not None:
        return price_by_hand(chip.name, prices.usd_per_chip_hour)
    if prices.term is None and prices.provider is None and not quotes(chip, prices.book):
        return None
    return chip_price(chip, prices.term, provider=prices.provider, book=prices.book, site=site)


def _power(scenario: Scenario, chip: ChipSpec) -> PowerModel | None:
    if chip.power.tdp is None or chip.power.tdp.value is None:
        return None
    prices = scenario.prices
    return power_model(chip, idle_share=prices.idle_power_fraction, host_share=prices.host_power_fraction)


def site_of(scenario: Scenario) -> Site:
    """Where a scenario's chips stand."""
    prices = scenario.prices
    return resolve_site(
        prices.region,
        prices.operator,
        usd_per_kwh=prices.usd_per_kwh,
        gco2_per_kwh=prices.gco2_per_kwh,
        pue=prices.pue,
        book=prices.book,
    )


def _text(quantity: Quantity) -> str:
    spread = "" if quantity.low is None or quantity.high is None else f" ({quantity.low:g} … {quantity.high:g})"
    unit = "" if quantity.unit in {"1", "fraction"} else f" {quantity.unit}"
    return f"{quantity.value:g}{unit}{spread}"


def _assumptions(resolved: Resolved) -> list[Assumption]:
    """Every sourced number the run used, with its grade; what the scenario sets itself is assumed."""
    scenario, d = resolved.scenario, resolved.deployment
    chip = d.slice.chip
    used = [f"compute.{d.compute_dtype}", f"compute.{d.attention_dtype}", "memory.hbm_capacity", "memory.hbm_bandwidth"]
    if resolved.slice.n_chips > 1:
        used += ["scale_up.bandwidth", "scale_up.achievable", "scale_up.latency"]
    if resolved.slice.n_nodes > 1:
        used += ["scale_out.bandwidth", "scale_out.latency"]
    used.append("power.tdp")
    found = []
    quantities = chip.quantities()
    overrides = scenario.efficiency.overrides
    efficiency = [] if scenario.efficiency.base == "ideal" else [p for p in quantities if p.startswith("efficiency.")]
    for path in dict.fromkeys(used + efficiency):
        quantity = quantities.get(path)
        name = path.removeprefix("efficiency.")
        if quantity is None or quantity.value is None or {name, f"{name}_s"} & set(overrides):
            continue
        source = f"{quantity.source}, {quantity.locator}" if quantity.locator else quantity.source
        found.append(Assumption(what=path, value=_text(quantity), kind=quantity.kind, source=source))
    if scenario.efficiency.base == "ideal":
        found.append(Assumption(what="efficiency", value="1, no overheads", kind="assumed", source="scenario"))
    found += [
        Assumption(what=f"efficiency.{name}", value=f"{value:g}", kind="assumed", source="scenario")
        for name, value in overrides.items()
    ]
    if scenario.engine.profile is not None:
        # The profile's host stands in for the chip's step and row overheads; what only a client sees is no part of a run.
        found = [a for a in found if a.what not in {"efficiency.step_overhead", "efficiency.row_overhead"}]
        found += [
            Assumption(
                what=f"engine profile: {path}", value=_text(quantity), kind=quantity.kind, source=quantity.source
            )
            for path, quantity in load_engine(scenario.engine.profile).quantities().items()
            if path not in {"memory.fraction", "memory.workspace", "host.request"}
        ]
    if scenario.engine.num_gpu_blocks_override is None:
        value = f"{scenario.engine.workspace_bytes / 1e9:g} GB per chip"
        found.append(Assumption(what="engine.workspace_bytes", value=value, kind="assumed", source="scenario default"))
    if scenario.engine.speculation is not None:
        found += assumptions_of(scenario.engine.speculation)
    if scenario.engine.policy == "sjf":
        sigma = scenario.engine.length_prediction_sigma
        value = f"log-normal error, sigma {sigma:g}" if sigma else "oracle: the true lengths"
        found.append(Assumption(what="output-length prediction", value=value, kind="assumed", source="scenario"))
    host = {name: value for name, value in scenario.engine.host.model_dump().items() if value}
    found += [
        Assumption(what=f"engine.host.{name}", value=f"{value}", kind="assumed", source="scenario")
        for name, value in host.items()
    ]
    found += resolved.price.inputs if resolved.price else ()
    if resolved.power is not None:
        found += resolved.power.inputs
        # An electricity price that nobody pays is no input.
        paid = scenario.prices.wants_electricity
        inputs = [item for item in resolved.site.inputs if paid or not item.what.startswith("electricity")]
        found += [item for item in inputs if item not in found]
    return found


def check_contradictions(scenario: Scenario, concurrency: int) -> None:
    """Refuse a closed loop with fewer clients than replicas: some replicas would have none.

    Raises
    ------
    InputError
        As said.
    """
    if 0 < concurrency < scenario.replicas:
        raise InputError(
            f"{scenario.name}: {concurrency} closed-loop clients cannot be divided over replicas = {scenario.replicas}; "
            "use at least one client per replica"
        )
