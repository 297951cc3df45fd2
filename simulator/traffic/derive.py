"""From a trace to the small table of quantiles that stands in for it: how ``workloads/traffic/azure-*.toml`` came about."""

import json
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.traffic.lengths import LengthTable
from simulator.traffic.readers import Trace

PROMPT_CLASSES = 64

#: Hundredths, and the ends: a percentile of the table is then a percentile of the trace.
PROMPT_PROBABILITIES = (0.0, 0.002, *(i / 100 for i in range(1, 100)), 0.998, 0.999, 1.0)

#: Closer together near 1, where output lengths spread out: the mean and the 99th percentile hang on the last few
#: per cent.
OUTPUT_PROBABILITIES = (
    *(0.0, 0.02),
    *(i / 20 for i in range(1, 18)),
    *(i / 100 for i in range(90, 99)),
    *(0.983, 0.986, 0.989, 0.992, 0.995, 0.9975, 1.0),
)


def length_table(prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]) -> LengthTable:
    """Joint quantile table of prompt and output lengths.

    Requests are sorted by prompt length (those of equal length stay in their order) and cut into 64 classes of equal size;
    each class keeps the quantiles of its outputs. Quantiles are Hazen's, row i of n standing at (i + ½)/n, rounded
    to whole tokens.

    Parameters
    ----------
    prompt_tokens, output_tokens
        [n] n at least 20 per class.
    """
    n = len(prompt_tokens)
    if n < 20 * PROMPT_CLASSES:
        raise InputError(f"{n} requests are too few for a joint table; need at least {20 * PROMPT_CLASSES}")
    by_prompt = output_tokens[np.argsort(prompt_tokens, kind="stable")]
    edges = (np.arange(PROMPT_CLASSES + 1) * n + PROMPT_CLASSES // 2) // PROMPT_CLASSES
    return LengthTable(
        prompt_probabilities=PROMPT_PROBABILITIES,
        prompt_tokens=_quantiles(prompt_tokens, PROMPT_PROBABILITIES),
        output_probabilities=OUTPUT_PROBABILITIES,
        output_tokens=tuple(_quantiles(by_prompt[low:high], OUTPUT_PROBABILITIES) for low, high in pairwise(edges)),
    )


def _quantiles(tokens: NDArray[np.int64], probabilities: tuple[float, ...]) -> tuple[int, ...]:
    values = np.quantile(tokens, probabilities, method="hazen")
    return tuple(int(value) for value in np.rint(values))


def table_toml(table: LengthTable) -> str:
    """Return the ``[lengths]`` table of a mix file."""
    rows = "".join(f"    {json.dumps(row)},\n" for row in table.output_tokens)
    return (
        "[lengths]\n"
        f"prompt_probabilities = {json.dumps(table.prompt_probabilities)}\n"
        f"prompt_tokens = {json.dumps(table.prompt_tokens)}\n"
        f"output_probabilities = {json.dumps(table.output_probabilities)}\n"
        f"output_tokens = [\n{rows}]\n"
    )


def rate_per_s(trace: Trace) -> float:
    """Mean arrival rate of a trace: requests after the first, over the time from first to last. [1/s]"""
    if trace.arrival_s is None or trace.arrival_s[-1] <= trace.arrival_s[0]:
        raise InputError(f"{trace.file}: has no times to take a rate from")
    return (len(trace) - 1) / float(trace.arrival_s[-1] - trace.arrival_s[0])


def mix_toml(trace: Trace, *, description: str, source: str, citation: str = "", licence: str = "") -> str:
    """Return a whole mix file for a trace: its joint length table, and Poisson arrivals at its mean rate."""
    table = length_table(trace.prompt_tokens, trace.output_tokens)
    said = {"source": source, "citation": citation, "licence": licence}
    origin = "".join(f"{name} = {json.dumps(text, ensure_ascii=False)}\n" for name, text in said.items() if text)
    arrival = ""
    if trace.arrival_s is not None:
        arrival = f'arrival = {{ process = "poisson", rate_per_s = {rate_per_s(trace):.4g} }}\n'
    return (
        "schema_version = 1\n"
        f"description = {json.dumps(description, ensure_ascii=False)}\n"
        f"{arrival}\n"
        "[origin]\n"
        f'{origin}kind = "derived"\n'
        'derivation = "simulator.traffic.derive.mix_toml; benchmarks/derive_mixes.py calls it"\n\n'
        f"{table_toml(table)}"
    )
