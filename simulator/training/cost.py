"""What a training run takes on a slice: chip time and wall time."""

from dataclasses import dataclass

from simulator.catalog.chips import DType
from simulator.catalog.slices import Slice
from simulator.errors import InputError
from simulator.training.flops import training_flops


@dataclass(frozen=True)
class TrainingSetup:
    """Where and how well a model is trained.

    Attributes
    ----------
    slice
        the chips of one run.
    mfu
        model FLOPs over peak while training runs, in (0, 1]. Large dense runs report 0.38–0.52.
    dtype
        arithmetic whose peak ``mfu`` refers to.
    overhead
        chip time paid over chip time trained, at least 1: restarts, evaluation, failed runs, data preparation. GPU-hours that labs
        publish for small members of a family imply factors up to 3.
    """

    slice: Slice
    mfu: float = 0.4
    dtype: DType = "bf16"
    overhead: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.mfu <= 1:
            raise InputError(f"training.mfu = {self.mfu}: must be in (0, 1]")
        if not 1 <= self.overhead < float("inf"):
            raise InputError(f"training.overhead = {self.overhead}: must be at least 1")

    @property
    def flops_per_chip_s(self) -> float:
        """Model FLOPs a chip completes in a second that is paid for. [FLOP/s]"""
        return self.slice.chip.peak_flops_per_s(self.dtype) * self.mfu / self.overhead


@dataclass(frozen=True)
class TrainingCost:
    """What a run takes."""

    flops: float
    chip_s: float
    wall_s: float

    @property
    def chip_hours(self) -> float:
        """Chip time. [chip-hours]"""
        return self.chip_s / 3600


def training_cost(parameters: float, tokens: float, setup: TrainingSetup) -> TrainingCost:
    """Cost of training N (active) parameters on D tokens: time = 6ND/(chips·peak·MFU), times the overhead.

    Raises
    ------
    InputError
        If N or D is not positive.
    UnpriceableError
        If the chip has no rate for the dtype.
    """
    for name, value in (("parameters", parameters), ("tokens", tokens)):
        if not 0 < value < float("inf"):
            raise InputError(f"training.{name} = {value}: must be positive and finite")
    flops = training_flops(parameters, tokens)
    chip_s = flops / setup.flops_per_chip_s
    return TrainingCost(
        flops=flops,
        chip_s=chip_s,
        wall_s=chip_s / setup.slice.n_chips,
    )
