"""Memory below HBM in scenarios: what ``[engine]`` says about it, in blocks and seconds of one deployment."""

from typing import TYPE_CHECKING, NamedTuple

from simulator.engine.kv_memory import HostSwap, Tier
from simulator.errors import InputError, UnpriceableError
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import MemoryFit, memory_fit
from simulator.roofline.pipeline import ShardedDeployment
from simulator.run.scenario import EngineOptions, TierOptions

if TYPE_CHECKING:
    from simulator.catalog.chips import ChipSpec


class KvPlace(NamedTuple):
    """Who holds a KV block: the deployment of each pipeline stage, the chips of one attention rank in it, and how it fills them."""

    stages: tuple[Deployment, ...]
    chips_per_stage: float
    fits: tuple[MemoryFit, ...]

    @classmethod
    def of(
        cls, deployment: Deployment, sharded: ShardedDeployment | None, drafted: MemoryFit | None = None
    ) -> "KvPlace":
        """The place of a replica's blocks; ``sharded`` if it is more than ``deployment`` alone, ``drafted`` with a drafter beside it."""
        stages = (deployment,) if sharded is None else sharded.stages
        chips: float = deployment.slice.n_chips
        if sharded is not None:
            chips = sharded.slice.n_chips / sharded.sharding.pp / sharded.sharding.dp
        return cls(stages, chips, (drafted,) if drafted else tuple(map(memory_fit, stages)))

    @property
    def n_chips(self) -> float:
        """Chips that hold a part of a block."""
        return len(self.stages) * self.chips_per_stage


def block_bytes(place: KvPlace) -> float:
    """Bytes of one KV block on all chips that hold a part of it: all layers, or those of one group, and a drafter's. [bytes]"""
    return sum(fit.block_size * fit.kv_bytes_per_token for fit in place.fits) * place.chips_per_stage


def host_bandwidth_bytes_per_s(place: KvPlace) -> float:
    """Bandwidth of the PCIe links of all these chips to their hosts, one direction. [bytes/s]

    Raises
    ------
    UnpriceableError
        If the chip's file does not state it.
    """
    chip: ChipSpec = place.stages[0].slice.chip
    if chip.host.pcie is None:
        raise UnpriceableError(
            f"{chip.name}: host.pcie is not published; state engine.swap_bandwidth_bytes_per_s, "
            "or bandwidth_bytes_per_s of each of engine.cache_tiers"
        )
    return chip.host.pcie.si(f"{chip.name}: host.pcie", "bytes/s") * place.n_chips


def host_swap(place: KvPlace, engine: EngineOptions) -> HostSwap | None:
    """Host memory for preempted requests; None where they are computed again."""
    if engine.host_blocks is None:
        return None
    bandwidth = engine.swap_bandwidth_bytes_per_s or host_bandwidth_bytes_per_s(place)
    block_s = block_bytes(place) / bandwidth
    return HostSwap(engine.host_blocks, block_s=block_s, overlapped=engine.swap_overlap)


def cache_tier(place: KvPlace, options: TierOptions) -> Tier:
    """A tier in blocks and seconds.

    Raises
    ------
    InputError
        If not exactly one of ``blocks`` and ``capacity_bytes`` is stated, or not even one block fits.
    """
    bytes_ = block_bytes(place)
    where = f"engine.cache_tiers {options.name!r}"
    if (options.blocks is None) == (options.capacity_bytes is None):
        raise InputError(f"{where}: state one of blocks and capacity_bytes")
    blocks = options.blocks if options.blocks is not None else int((options.capacity_bytes or 0.0) // bytes_)
    if blocks < 1:
        raise InputError(
            f"{where}: capacity_bytes = {options.capacity_bytes} is less than a block of {bytes_:.0f} bytes"
        )
    bandwidth = options.bandwidth_bytes_per_s or host_bandwidth_bytes_per_s(place)
    return Tier(
        blocks,
        block_s=bytes_ / bandwidth,
        latency_s=options.latency_s,
        name=options.name,
        write_through=options.write_through,
    )
