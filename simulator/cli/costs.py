"""Options on what steps cost that several commands share: overlap, imbalance of experts, unpacking of weights."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def cost_options(command: Command) -> Command:
    """Add ``--overlap``, ``--expert-imbalance`` and ``--dequantization-flops``; their values go through :func:`costs`."""
    for option in (
        click.option(
            "--dequantization-flops",
            type=float,
            help="What unpacking one narrow weight costs, in FLOPs of the matrix units. Default: 32.",
        ),
        click.option(
            "--expert-imbalance", type=float, help="Busiest against mean time of routed experts, from 1. Default: 1."
        ),
        click.option(
            "--overlap", type=float, help="Fraction of collectives that may hide behind products, 0 to 1. Default: 0."
        ),
    ):
        command = option(command)
    return command


def costs(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of :class:`~simulator.roofline.deployment.Deployment` that the options say; it checks their ranges."""
    names = ("overlap", "expert_imbalance", "dequantization_flops", "looped_exchange")
    return {name: options[name] for name in names if options.get(name) is not None}
