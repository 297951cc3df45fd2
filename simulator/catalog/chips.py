"""Chips: what one file of ``hardware_specs`` may say, and the SI values the rest of the package reads.

A chip is data. Its file gives every number with unit, source and kind (:class:`~simulator.catalog.records.Quantity`),
the rule that says which slices exist, dated prices, and, where measured, its own efficiencies; the others come from
the file of its family. Compute rates are dense (no structured sparsity); link bandwidths are one direction.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from simulator.catalog.files import data_folder, find, names_in, parse, read_toml
from simulator.catalog.kernel_curves import KernelCurves, load_curves
from simulator.catalog.prices import OwnershipSpec, PriceQuote
from simulator.catalog.records import Kind, Quantity, Record, quantities_in
from simulator.errors import InputError, UnpriceableError, nearest
from simulator.units import UNITS, to_si

Family = Literal["tpu", "nvidia", "amd", "aws", "intel", "apple", "sram", "cpu"]
DType = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8", "int4", "fp4"]

#: Wide on purpose: they catch a wrong unit (TB for GB, Gb for GB), not a wrong digit.
_SANE: dict[str, tuple[float, float]] = {
    "compute": (1e8, 1e18),
    "capacity": (1e8, 1e13),
    "memory bandwidth": (1e8, 1e17),
    "on-chip memory": (1e6, 1e11),
    "link bandwidth": (1e8, 1e13),
    "latency": (1e-8, 1e-3),
    "power": (1, 1e5),
    "host memory": (1e9, 1e14),
    "fraction": (1e-3, 1),
    "overhead": (0, 1),
    "multiprocessors": (1, 1e6),
}


#: What every chip but a CPU exceeds: below it the unit is wrong (GFLOP/s for TFLOP/s, GB/s for TB/s).
_LEAST_OF_ACCELERATORS = {"compute": 1e12, "memory bandwidth": 1e11}


def _checked(dimension: str, sane: str) -> Callable[[Quantity], Quantity]:
    """Check one quantity: its dimension, its order of magnitude, and that low ≤ value ≤ high."""
    least, most = _SANE[sane]

    def check(quantity: Quantity) -> Quantity:
        if quantity.unit not in UNITS:
            raise ValueError(f"unknown unit {quantity.unit!r}{nearest(quantity.unit, UNITS)}")
        found, factor = UNITS[quantity.unit]
        if found != dimension:
            allowed = ", ".join(u for u, (d, _) in UNITS.items() if d == dimension)
            raise ValueError(f"unit {quantity.unit!r} measures {found}, expected {dimension}: one of {allowed}")
        if quantity.value is None:
            return quantity
        if not least <= quantity.value * factor <= most:
            raise ValueError(
                f"{quantity.value:g} {quantity.unit} is no plausible {sane}: allowed {least:g} to {most:g} {dimension}"
            )
        low = quantity.value if quantity.low is None else quantity.low
        high = quantity.value if quantity.high is None else quantity.high
        if not low <= quantity.value <= high:
            raise ValueError(f"value {quantity.value:g} lies outside low {low:g} … high {high:g}")
        return quantity

    return check


def quantity_si(quantity: Quantity | None) -> float | None:
    """Value in the SI base unit of the quantity's own dimension; None where it is absent or not published."""
    return None if quantity is None or quantity.value is None else to_si(quantity.value, quantity.unit)


Rate = Annotated[Quantity, AfterValidator(_checked("flops/s", "compute"))]
Capacity = Annotated[Quantity, AfterValidator(_checked("bytes", "capacity"))]
MemoryBandwidth = Annotated[Quantity, AfterValidator(_checked("bytes/s", "memory bandwidth"))]
OnChip = Annotated[Quantity, AfterValidator(_checked("bytes", "on-chip memory"))]
LinkBandwidth = Annotated[Quantity, AfterValidator(_checked("bytes/s", "link bandwidth"))]
Latency = Annotated[Quantity, AfterValidator(_checked("s", "latency"))]
Power = Annotated[Quantity, AfterValidator(_checked("W", "power"))]
HostMemory = Annotated[Quantity, AfterValidator(_checked("bytes", "host memory"))]
Fraction = Annotated[Quantity, AfterValidator(_checked("1", "fraction"))]
Overhead = Annotated[Quantity, AfterValidator(_checked("s", "overhead"))]
Count = Annotated[Quantity, AfterValidator(_checked("1", "multiprocessors"))]


class MemorySpec(Record):
    """The memory that holds weights and KV cache, and the largest memory on the die."""

    technology: str = ""
    hbm_capacity: Capacity
    """Bytes a program can see. HBM of any technology: HBM, GDDR, unified memory, or SRAM on SRAM machines."""
    hbm_bandwidth: MemoryBandwidth
    on_chip: OnChip | None = None
    """VMEM, L2 or last-level cache: the largest on-die memory."""
    on_chip_bandwidth: MemoryBandwidth | None = None


class PowerSpec(Record):
    """Electrical power of one chip."""

    tdp: Power | None = None
    """Board or package limit."""
    idle: Power | None = None
    measured_mean: Power | None = None


class WrapRule(Record):
    """When the axes of a torus close into rings; exactly one of the two."""

    axis_length: PositiveInt | None = None
    """An axis wraps if, and only if, it has this length."""
    every_axis_multiple_of: PositiveInt | None = None
    """All axes wrap if every axis is a multiple of this; otherwise none does."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "WrapRule":
        if (self.axis_length is None) == (self.every_axis_multiple_of is None):
            raise ValueError("give exactly one of axis_length and every_axis_multiple_of")
        return self

    def wraps(self, dims: tuple[int, ...]) -> tuple[bool, ...]:
        """Whether each axis of a slice closes into a ring."""
        if self.axis_length is not None:
            return tuple(d == self.axis_length for d in dims)
        step = self.every_axis_multiple_of or 1
        closed = all(d % step == 0 for d in dims)
        return tuple(closed for _ in dims)


class _ScaleUp(Record):
    network: str
    """What the links are called: ICI, NVLink, Infinity Fabric, PCIe …"""
    bandwidth: LinkBandwidth
    """Nominal, one direction: per link for ``torus`` and ``full_mesh``, else per chip over all its links."""
    achievable: LinkBandwidth | None = None
    """What transfers reach; slices use it in place of the nominal figure."""
    latency: Latency
    """Per hop for ``torus``, else per message."""
    published_per_chip: LinkBandwidth | None = None
    """The vendor's headline figure, both directions, all links."""
    source: str
    """Of the shapes and rules below."""
    locator: str = ""
    kind: Kind
    note: str = ""


class TorusScaleUp(_ScaleUp):
    """Point-to-point links along the axes of a grid."""

    topology: Literal["torus"]
    shapes: tuple[tuple[PositiveInt, ...], ...] = Field(min_length=1)
    multiples_of: PositiveInt | None = None
    """Shapes whose axes are all multiples of this exist too, up to ``largest``."""
    largest: tuple[PositiveInt, ...] = ()
    links_per_chip: PositiveInt
    wrap: WrapRule

    @model_validator(mode="after")
    def _same_rank(self) -> "TorusScaleUp":
        ranks = {len(shape) for shape in self.shapes} | ({len(self.largest)} if self.largest else set())
        if len(ranks) != 1:
            raise ValueError(f"shapes and largest must have one number of axes, got {sorted(ranks)}")
        if (self.multiples_of is None) != (not self.largest):
            raise ValueError("multiples_of and largest go together")
        return self


class DomainScaleUp(_ScaleUp):
    """Chips that all reach each other: through switches, by one link per pair, or over the host's PCIe."""

    topology: Literal["switched", "full_mesh", "pcie"]
    sizes: tuple[PositiveInt, ...] = Field(min_length=1)
    """Legal chip counts inside one domain."""


class Bridge(Record):
    """NVLink bridge between two PCIe cards."""

    fitted: bool
    """Whether slices of this chip assume the bridge; copy the file to say otherwise."""
    bandwidth: LinkBandwidth
    latency: Latency


class ScaleOut(Record):
    """Network between domains: NICs of a GPU node, data-centre network of a TPU host."""

    network: str
    bandwidth: LinkBandwidth
    """Per chip, one direction."""
    latency: Latency
    """Per message."""


class HostSpec(Record):
    """The machine a chip sits in."""

    chips: PositiveInt | None = None
    dram: HostMemory | None = None
    """Of the whole host."""
    pcie: LinkBandwidth | None = None
    """Per chip, one direction."""
    coherent_link: LinkBandwidth | None = None
    """CPU–GPU link of superchips, one direction."""


@dataclass(frozen=True)
class Efficiency:
    """What fraction of the datasheet a step reaches, and the fixed times no datasheet has.

    Attributes
    ----------
    matmul
        Fraction of peak FLOP/s that large matrix products reach.
    hbm
        Fraction of HBM bandwidth reached when streaming weights.
    attention
        Fraction of peak FLOP/s reached by prefill attention.
    kv
        Fraction of HBM bandwidth reached by decode attention reading the KV cache.
    link
        Fraction of the slice's link bandwidth reached by collectives.
    op_overhead_s
        Gap between kernels inside a captured graph, per operation. [s]
    collective_latency_s
        Software time of one collective, on top of the latency of its hops. [s]
    step_overhead_s
        Host work of one step that the chips wait for. [s]
    row_overhead_s
        Sampling and detokenising, per sequence and step. [s]
    curves
        Fitted curves of the kernels that were measured; they take the place of the constants above, which price the
        rest. None: constants alone.
    """

    matmul: float
    hbm: float
    attention: float
    kv: float
    link: float
    op_overhead_s: float
    collective_latency_s: float
    step_overhead_s: float
    row_overhead_s: float
    curves: KernelCurves | None = None

    @property
    def constants(self) -> dict[str, float]:
        """The constants by name, without the curves."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "curves"}

    def override(self, **values: float) -> "Efficiency":
        """With some constants given by hand, which then stand for the curves of the kernels they describe.

        >>> IDEAL.override(matmul=0.5).matmul
        0.5
        """
        dropped = [op for name in values for op in _DESCRIBED_BY.get(name, ())]
        curves = None if self.curves is None else self.curves.without(*dropped)
        return replace(self, curves=curves, **values)


#: Kernels whose curves a constant given by hand replaces.
_DESCRIBED_BY: dict[str, tuple[str, ...]] = {
    "matmul": ("gemm", "gemv", "moe"),
    "hbm": ("gemm", "gemv", "moe"),
    "attention": ("attention_prefill", "mla_prefill"),
    "kv": ("attention_decode", "mla_decode"),
    "link": ("all_reduce", "all_gather", "reduce_scatter", "alltoall"),
    "collective_latency_s": ("all_reduce", "all_gather", "reduce_scatter", "alltoall"),
    "op_overhead_s": ("gemm", "gemv", "moe", "attention_prefill", "mla_prefill", "attention_decode", "mla_decode"),
}


#: The datasheet as it stands: nothing lost, nothing fixed.
IDEAL = Efficiency(
    matmul=1.0,
    hbm=1.0,
    attention=1.0,
    kv=1.0,
    link=1.0,
    op_overhead_s=0.0,
    collective_latency_s=0.0,
    step_overhead_s=0.0,
    row_overhead_s=0.0,
)


class EfficiencyTable(Record):
    """An :class:`Efficiency` as a file writes it: each value with its provenance."""

    matmul: Fraction
    hbm: Fraction
    attention: Fraction
    kv: Fraction
    link: Fraction
    op_overhead: Overhead
    collective_latency: Overhead
    step_overhead: Overhead
    row_overhead: Overhead


class FamilySpec(Record):
    """Defaults of a chip family (``hardware_specs/families/*.toml``)."""

    schema_version: Literal[1] = 1
    family: Family
    efficiency: EfficiencyTable


class ChipSpec(Record):
    """One chip: the record of a file in ``hardware_specs``."""

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    vendor: str
    family: Family
    launched: str = Field(default="", pattern=r"^(\d{4}(-\d{2})?)?$")
    """Year, or year and month; empty where nobody knows, as of a measured machine."""
    note: str = ""
    driver_names: tuple[str, ...] = ()
    """What drivers call the chip, as ``torch.cuda.get_device_name`` gives it."""
    compute: dict[DType, Rate] = Field(min_length=1)
    """Dense rate per arithmetic type; a type the chip lacks, or only emulates at the bf16 rate, is absent."""
    multiprocessors: Count | None = None
    """Units that each work on one tile of a kernel at a time: streaming multiprocessors of a GPU."""
    memory: MemorySpec
    power: PowerSpec = PowerSpec()
    scale_up: TorusScaleUp | DomainScaleUp | None = Field(default=None, discriminator="topology")
    """None: only slices of one chip."""
    bridge: Bridge | None = None
    scale_out: ScaleOut | None = None
    host: HostSpec = HostSpec()
    prices: tuple[PriceQuote, ...] = ()
    """The first is the default."""
    ownership: OwnershipSpec | None = None
    """What buying one takes."""
    efficiency_table: EfficiencyTable = Field(alias="efficiency")
    efficiency_source: str
    """Which file each efficiency came from, as a sentence."""
    calibration: str = ""
    """Chip whose measured kernels stand for this one's, or the path of the user's own calibration; empty: none do."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Bibliography of a file outside the catalogue: key -> title."""

    @model_validator(mode="after")
    def _plausible(self) -> "ChipSpec":
        rates = {str(d): si for d, q in self.compute.items() if (si := quantity_si(q)) is not None}
        for slow, fast in (("fp32", "tf32"), ("tf32", "bf16"), ("bf16", "fp8"), ("fp16", "fp8"), ("fp8", "fp4")):
            if slow in rates and fast in rates and rates[fast] < rates[slow]:
                raise ValueError(f"compute.{fast} is slower than compute.{slow}: sparse, per-die or swapped figures?")
        if self.family != "cpu":
            checks = [("compute", f"compute.{d}", q) for d, q in self.compute.items()]
            for what, path, quantity in [
                *checks,
                ("memory bandwidth", "memory.hbm_bandwidth", self.memory.hbm_bandwidth),
            ]:
                found = quantity_si(quantity)
                if found is not None and found < _LEAST_OF_ACCELERATORS[what]:
                    raise ValueError(
                        f"{path}: {quantity.value:g} {quantity.unit} is no plausible {what} of anything but a CPU "
                        f"(family = 'cpu'): at least {_LEAST_OF_ACCELERATORS[what]:g}"
                    )
        capacity, on_chip = quantity_si(self.memory.hbm_capacity), quantity_si(self.memory.on_chip)
        if capacity is not None and on_chip is not None and on_chip > capacity:
            raise ValueError("memory.on_chip is larger than memory.hbm_capacity")
        if self.prices and self.prices[0].usd_per_hour is None:
            raise ValueError("prices.0 is the default and must be published")
        if self.scale_up is not None:
            nominal, achievable = quantity_si(self.scale_up.bandwidth), quantity_si(self.scale_up.achievable)
            if nominal is not None and achievable is not None and achievable > nominal:
                raise ValueError("scale_up.achievable exceeds the nominal scale_up.bandwidth")
        return self

    @property
    def has_matrix_units(self) -> bool:
        """Whether products run on units that take whole tiles, so that few rows cost as much as a tile of them."""
        return self.family != "cpu"

    def has_dtype(self, dtype: str) -> bool:
        """Whether the chip computes in ``dtype`` at a rate of its own (the rate may still be unpublished)."""
        return dtype in self.compute

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense rate of matrix products in ``dtype``. [FLOP/s]

        Raises
        ------
        InputError
            If the chip has no such type; the message lists those it has.
        UnpriceableError
            If the vendor has not published the rate.
        """
        quantity = {str(d): q for d, q in self.compute.items()}.get(dtype)
        if quantity is None:
            raise InputError(f"{self.name} does not compute in {dtype!r}; it has {', '.join(self.compute)}")
        return quantity.si(f"{self.name}: compute.{dtype}", "flops/s")

    @property
    def hbm_capacity_bytes(self) -> float:
        """Main memory a program can see. [bytes]"""
        return self.memory.hbm_capacity.si(f"{self.name}: memory.hbm_capacity", "bytes")

    @property
    def hbm_bandwidth_bytes_per_s(self) -> float:
        """Datasheet bandwidth of the main memory. [bytes/s]"""
        return self.memory.hbm_bandwidth.si(f"{self.name}: memory.hbm_bandwidth", "bytes/s")

    @property
    def tdp_w(self) -> float:
        """Power limit of one chip. [W]"""
        return self._needed(self.power.tdp, "power.tdp").si(f"{self.name}: power.tdp", "W")

    @property
    def default_price(self) -> PriceQuote:
        """First price of the file."""
        if not self.prices:
            raise UnpriceableError(f"{self.name} has no price in its file; give one in the scenario")
        return self.prices[0]

    @property
    def efficiency(self) -> Efficiency:
        """Efficiencies of the family, or the chip's own where its file has them."""
        table = self.efficiency_table
        return Efficiency(
            matmul=table.matmul.si("efficiency.matmul", "1"),
            hbm=table.hbm.si("efficiency.hbm", "1"),
            attention=table.attention.si("efficiency.attention", "1"),
            kv=table.kv.si("efficiency.kv", "1"),
            link=table.link.si("efficiency.link", "1"),
            op_overhead_s=table.op_overhead.si("efficiency.op_overhead", "s"),
            collective_latency_s=table.collective_latency.si("efficiency.collective_latency", "s"),
            step_overhead_s=table.step_overhead.si("efficiency.step_overhead", "s"),
            row_overhead_s=table.row_overhead.si("efficiency.row_overhead", "s"),
            curves=load_curves(self.calibration) if self.calibration else None,
        )

    @property
    def multiprocessor_count(self) -> float:
        """Multiprocessors of the chip."""
        return self._needed(self.multiprocessors, "multiprocessors").si(f"{self.name}: multiprocessors", "1")

    def critical_intensity(self, dtype: str = "bf16") -> float:
        """FLOPs per HBM byte at which compute and memory take equally long. [FLOP/byte]"""
        return self.peak_flops_per_s(dtype) / self.hbm_bandwidth_bytes_per_s

    def quantities(self) -> dict[str, Quantity]:
        """Every sourced number of the chip by its dotted path, e.g. ``compute.bf16``."""
        # Named as the file names them.
        parts = {k.removesuffix("_table"): getattr(self, k) for k in type(self).model_fields}
        return dict(quantities_in("", parts))

    def _needed(self, quantity: Quantity | None, field: str) -> Quantity:
        if quantity is None:
            raise UnpriceableError(f"{self.name}: {field} is not in the chip's file; it cannot be used in a cost")
        return quantity


def chip_names() -> list[str]:
    """Names of the chips in the catalogue, sorted."""
    return [name for name in names_in(data_folder("hardware_specs")) if name != "sources"]


def chip_called(driver_name: str) -> str | None:
    """Name of the catalogue's chip that a driver calls ``driver_name``; None if none is known by it.

    >>> chip_called("NVIDIA H100 80GB HBM3")
    'h100-sxm'
    """
    return next((name for name in chip_names() if driver_name in load_chip(name).driver_names), None)


class Source(Record):
    """One entry of the bibliography."""

    title: str
    kind: Literal["vendor documentation", "book", "code repository", "compilation", "measurements", "this project"]
    version: str = ""
    url: str = ""
    note: str = ""


@cache
def sources() -> dict[str, Source]:
    """Bibliography of the hardware catalogue: key -> entry."""
    file = data_folder("hardware_specs") / "sources.toml"
    return {key: parse(Source, entry, f"{file}: {key}") for key, entry in read_toml(file).items()}


@cache
def family_defaults(family: Family) -> FamilySpec:
    """Defaults of a chip family."""
    file = data_folder("hardware_specs") / "families" / f"{family}.toml"
    return parse(FamilySpec, read_toml(file), str(file))


def load_chip(name_or_path: str) -> ChipSpec:
    """Load a chip of the catalogue by name, or the user's own by the path of its file.

    Raises
    ------
    InputError
        If there is no such chip or file, a field is wrong, or a number cites a source that is not listed.
    """
    own_file = name_or_path.endswith(".toml") or "/" in name_or_path
    if not own_file and name_or_path not in (known := chip_names()):
        inside = [n for n in known if len(name_or_path) > 2 and name_or_path in n]
        hint = "; did you mean " + " or ".join(map(repr, inside)) + "?" if inside else nearest(name_or_path, known)
        raise InputError(f"unknown chip {name_or_path!r}{hint}")
    return _read_chip(name_or_path) if own_file else _catalogue_chip(name_or_path)


@cache
def _catalogue_chip(name: str) -> ChipSpec:
    return _read_chip(name)


def _read_chip(name_or_path: str) -> ChipSpec:
    file = find("chip", name_or_path, data_folder("hardware_specs"))
    data = read_toml(file)
    where = str(file) if name_or_path.endswith(".toml") or "/" in name_or_path else f"hardware_specs/{file.name}"
    families = get_args(Family)
    if data.get("family") not in families:
        raise InputError(f"{where}: family = {data.get('family')!r}{nearest(str(data.get('family')), families)}")
    if "efficiency_source" in data:
        raise InputError(f"{where}: efficiency_source is worked out by the loader; remove it")
    own = data.get("efficiency", {})
    if not isinstance(own, dict):
        raise InputError(f"{where}: efficiency = {own!r}: must be a table")
    family = family_defaults(data["family"])
    defaults = {k: getattr(family.efficiency, k) for k in EfficiencyTable.model_fields}
    data["efficiency"] = {**defaults, **own}
    data["efficiency_source"] = f"defaults of family {family.family!r}" + (
        f"; the chip's own: {', '.join(own)}" if own else ""
    )
    if data.get("calibration"):
        data["efficiency_source"] += _calibrated(data, file, where)
    chip = parse(ChipSpec, data, where)
    if chip.name != file.name.removesuffix(".toml"):
        raise InputError(f"{where}: name = {chip.name!r} must be the file's own name")
    _check_sources(chip, where)
    return chip


def _calibrated(data: dict[str, Any], file: Traversable, where: str) -> str:
    """Resolve a file's ``calibration`` and say what it is. Its curves are read when they are used."""
    name = data["calibration"]
    if not isinstance(name, str):
        raise InputError(f"{where}: calibration = {name!r}: must be the name of a measured chip, or the path of a file")
    if name.endswith(".toml"):  # beside the chip's own file
        data["calibration"] = str(Path(str(file)).parent / name)
    if "multiprocessors" not in data:
        raise InputError(f"{where}: calibration = {name!r} needs multiprocessors: tiles and waves are counted in them")
    find("calibration", data["calibration"], data_folder("hardware_specs") / "calibration")
    if name == data.get("name"):
        return "; kernels as measured on this chip"
    return f"; kernels as measured on {name}" + ("" if name.endswith(".toml") else ", of its family")


def _check_sources(chip: ChipSpec, where: str) -> None:
    known = {*sources(), *chip.sources}
    cited = [(path, q.source) for path, q in chip.quantities().items()]
    cited += [(f"prices.{i}", price.source) for i, price in enumerate(chip.prices)]
    if chip.scale_up is not None:
        cited.append(("scale_up", chip.scale_up.source))
    for path, source in cited:
        if source not in known:
            raise InputError(f"{where}: {path}.source = {source!r} is not in the bibliography{nearest(source, known)}")
