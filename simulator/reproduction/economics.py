"""Our side of the table on dollars, joules and carbon."""

from functools import partial

from simulator.catalog.chips import load_chip
from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.catalog.price_book import NO_PRICES
from simulator.catalog.slices import resolve_slice
from simulator.economics import chip_price, owned_inputs, power_model, price_by_hand, resolve_site
from simulator.lifetime.training_bill import TrainingBill, bill_of, training_bill
from simulator.reproduction.rows import Ours
from simulator.training.cost import TrainingCost, TrainingSetup

#: Chip, model (active parameters), tokens and the MFU that the published hours imply (table ``training``), in percent.
_RUNS = {
    "llama-1-65b": ("a100-80-sxm:8", "llama-1-65b", 1.4e12, 47.8),
    "llama-2-70b": ("a100-80-sxm:8", "llama-2-70b", 2e12, 42.8),
    "llama-3-70b": ("h100-sxm:8", "llama-3-70b", 15e12, 27.9),
    "llama-3.1-405b": ("h100-sxm:8", "llama-3.1-405b", 15.6e12, 34.5),
}
_DEEPSEEK_HOURS = {"pre-training": 2.664e6, "context": 0.119e6, "post-training": 0.005e6}


def rows_ours() -> Ours:
    """Our side of ``data/economics.csv``."""
    return {
        "deepseek-usd": lambda: sum(_hours(h).usd for h in _DEEPSEEK_HOURS.values()) / 1e6,
        "deepseek-hours": lambda: _deepseek().cost.chip_hours / 1e6,
        **{f"hours-{name}": partial(_run_hours, name) for name in _RUNS},
        "llama3-mwh": lambda: (_llama3().chip_joules or 0.0) / 3.6e9,
        "llama3-carbon": lambda: (_llama3().gco2 or 0.0) / 1e6,
        **{
            f"slice-{spec.replace(':', '-')}": partial(_slice_usd, spec)
            for spec in ("tpu-v5e:2x4", "tpu-v5e:16x16", "tpu-v5p:2x2x1", "tpu-v6e:2x4")
        },
        "h100-purchase": _h100_purchase,
        "agent-usd": lambda: 26.643814 * chip_price(load_chip("tpu-v5e")).usd_per_chip_hour / 3600,
    }


def _hours(chip_hours: float) -> TrainingBill:
    """Published GPU-hours at two dollars."""
    seconds = 3600 * chip_hours
    return bill_of(TrainingCost(flops=1.0, chip_s=seconds, wall_s=seconds), price_by_hand("h800", 2.0))


def _deepseek() -> TrainingBill:
    # The H800 computes like the H100; its links are slower.
    setup = TrainingSetup(resolve_slice("h100-sxm:8"), mfu=0.346)
    return training_bill(37e9, 14.8e12, setup, price_by_hand("h800", 2.0))


def _run_hours(name: str) -> float:
    spec, model, tokens, mfu_percent = _RUNS[name]
    setup = TrainingSetup(resolve_slice(spec), mfu=mfu_percent / 100)
    bill = training_bill(count(load_model(model)).total, tokens, setup, price_by_hand(setup.slice.chip.name, 2.0))
    return bill.cost.chip_hours / 1e6


def _llama3() -> TrainingBill:
    """39.3 million GPU-hours at the chips' limit, hosts left out as the model cards do, in Meta's buildings."""
    seconds = 3600 * 39.3e6
    return bill_of(
        TrainingCost(flops=1.0, chip_s=seconds, wall_s=seconds),
        price_by_hand("h100-sxm", 2.0),
        power=power_model(load_chip("h100-sxm"), host_share=0.0),
        site=resolve_site("united-states", "meta"),
    )


def _slice_usd(spec: str) -> float:
    found = resolve_slice(spec)
    return found.n_chips * chip_price(found.chip, "on-demand").usd_per_chip_hour


def _h100_purchase() -> float:
    inputs, _, _, _ = owned_inputs(load_chip("h100-sxm"), NO_PRICES, resolve_site())
    return inputs.purchase_usd
