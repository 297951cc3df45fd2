"""What fits where: the smallest slice of each chip that holds a model and one whole sequence."""

from dataclasses import dataclass, replace

from simulator.catalog.slices import legal_slices, resolve_slice
from simulator.errors import ChipsecondsError
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import MemoryFit, memory_fit
from simulator.roofline.sweep import max_batch


@dataclass(frozen=True)
class Place:
    """A deployment on the smallest slice of one chip that holds it, or why there is none.

    Attributes
    ----------
    chip
        name in the catalogue, or path of a chip file.
    deployment, fit
        on that slice; None if no slice of one scale-up domain will do.
    max_batch
        sequences of the asked context the KV cache holds; 0 without a slice.
    why
        empty, or the reason why there is no slice.
    """

    chip: str
    deployment: Deployment | None
    fit: MemoryFit | None
    max_batch: int
    why: str = ""


def smallest_place(template: Deployment, chip: str, context: int) -> Place:
    """The smallest slice of ``chip`` whose KV cache holds one sequence of ``context`` tokens beside the weights.

    Slices of one scale-up domain are tried, smallest first; those that the model cannot be sharded over are passed by.

    Parameters
    ----------
    template
        model, precision and settings; its slice and tensor-parallel degree are replaced. It was checked when it was made,
        so what is refused here is for the chip's sake.

    Raises
    ------
    InputError
        If the chip is unknown.
    """
    why = ""
    for spec in legal_slices(chip):
        try:
            d = replace(template, slice=resolve_slice(spec), tp=None)
            fit = memory_fit(d)
        except ChipsecondsError as error:
            why = why or str(error)
            continue
        batch = int(max_batch(fit, context))
        if batch:
            return Place(chip, d, fit, batch)
        short = "not even the weights fit" if fit.weights_bytes > fit.usable_bytes else "no room for one sequence"
        why = (
            f"{short} on {spec}, the largest it can be sharded over: {fit.weights_bytes / 1e9:.1f} GB of weights per "
            f"chip of {fit.usable_bytes / 1e9:.1f} GB"
        )
    return Place(chip, None, None, 0, why)
