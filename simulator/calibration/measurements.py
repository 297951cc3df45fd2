"""Measured serving runs: one record per row, whatever table it came from, and how it was taken.

A measurement says what served (model, chip, engine, formats), laid out how (:class:`Pool`), under which load, and what was
measured. The readers of the tables are in :mod:`simulator.calibration.tables`, the simulation of a measurement in
:mod:`simulator.calibration.harness`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from simulator.catalog.chips import chip_names
from simulator.catalog.models import model_aliases, model_names
from simulator.engine.records import Requests
from simulator.errors import UnpriceableError, nearest

Load = Literal["closed", "queued", "poisson", "replay"]
"""A fixed number of clients; everything queued at time 0; Poisson arrivals; a log's own arrivals."""

METRICS = ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s")
"""Means over the run's requests; the last is of all chips together."""


@dataclass(frozen=True)
class Pool:
    """Equal engines that share the work of one role.

    Attributes
    ----------
    workers
        engines.
    tp, pp, dp, ep
        sharding of each, as in :class:`~simulator.roofline.sharding.Sharding`; ``dp`` are ranks of attention.
    max_num_seqs, max_num_batched_tokens
        limits of one rank where the measurement states them; None: the engine profile's.
    """

    workers: int = 1
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None

    @property
    def chips(self) -> int:
        """Chips of one engine."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        """As a sharding word, engines in front."""
        word = "".join(f"{n}{v}" for n in ("tp", "pp", "dp", "ep") if (v := getattr(self, n)) > 1) or "tp1"
        return f"{self.workers}x{word}" if self.workers > 1 else word


@dataclass(frozen=True)
class Measurement:
    """One measured run.

    Attributes
    ----------
    id, table
        row and the file it came from.
    model, chip
        catalogue names.
    engine, engine_version
        name of the engine profile, and the version as recorded (empty if it was not).
    dtype, precision
        the table's word for the formats, and ours.
    pools
        one, or the prefill and the decode pool.
    load, clients, rate_per_s
        how requests arrive; clients of a closed loop; rate of Poisson arrivals. [requests/s]
    prompt_tokens, output_tokens, range_ratio
        longest request; each length is uniform in [ratio·L, L], 1 is fixed. Unused in a replay.
    n_requests
        requests of the run.
    measured
        metric -> value: those of :data:`METRICS`, and ``<metric>_p50`` … where a log has every request.
    poll_steps
        steps between two looks of the scheduler for new requests, where the recipe sets it; 0: every step.
    hold_steps
        steps for which the scheduler holds a prompt back for company, where the recipe sets it.
    beams
        sequences that a request is decoded into, of which one counts: beam search. They share the computed prompt.
    stream_interval
        steps of a decode pool between two answers to a client.
    unclear
        what the table leaves open about the run, in words: such a run is predicted but not fitted to. Empty: nothing.
    memory_fraction
        of the engine's rule for its memory, where the recipe sets it; None: the engine profile's.
    replay
        the log's requests, of a replay.
    """

    id: str
    table: str
    model: str
    chip: str
    engine: str
    engine_version: str
    dtype: str
    precision: str
    pools: tuple[Pool, ...]
    load: Load
    clients: int
    prompt_tokens: int
    output_tokens: int
    range_ratio: float
    n_requests: int
    measured: Mapping[str, float] = field(hash=False)
    rate_per_s: float = 0.0
    poll_steps: int = 0
    hold_steps: int = 0
    stream_interval: int = 1
    memory_fraction: float | None = None
    unclear: str = ""
    beams: int = 1
    replay: Requests | None = field(default=None, compare=False, repr=False)

    @property
    def group(self) -> tuple[str, str, str, str]:
        """Model, chip, engine and formats: what a split leaves out as a whole."""
        return self.model, self.chip, self.engine, self.dtype

    @property
    def release(self) -> tuple[str, str]:
        """Engine and version."""
        return self.engine, self.engine_version or "unknown"

    @property
    def chips(self) -> int:
        """Chips of all pools."""
        return sum(pool.workers * pool.chips for pool in self.pools)

    @property
    def load_class(self) -> str:
        """Clients per chip in words, for tables of errors."""
        if self.load != "closed":
            return self.load
        per_chip = self.clients / self.chips
        return "1 client/chip or fewer" if per_chip <= 1 else "up to 8/chip" if per_chip <= 8 else "above 8/chip"


#: Spellings of chips in published tables that are not the catalogue's with underscores for hyphens, with or without the board's name.
CHIPS = {
    "a100_sxm": "a100-80-sxm",
    "a100_pcie": "a100-80-pcie",
    "rtx_pro_6000_server": "rtx-pro-6000",
    "tpu_v7x": "tpu-7x",
}

#: Boards and racks: tables may name one where the catalogue has a chip on no other, or leave it out where the chip is sold on several.
_BOARDS = ("-sxm", "-nvl72", "-nvl")

#: Parts of released checkpoints' names that do not change the architecture.
_RELEASES = re.compile(
    r"-(instruct|chat|base|hf|it|thinking|17b-128e|17b-16e|(fp8|fp4|nvfp4|mxfp4)(-v\d)?|int4|int8|bf16|awq|gptq|v0\.1|\d{4})$"
)


def chip_name(written: str) -> str:
    """Catalogue name of a chip as tables spell it.

    Raises
    ------
    UnpriceableError
        If the catalogue has no such chip.

    A chip named without its board is taken on the board of most published runs, SXM.

    >>> chip_name("h100_sxm"), chip_name("gb200_sxm"), chip_name("tpu_v6e"), chip_name("H200")
    ('h100-sxm', 'gb200', 'tpu-v6e', 'h200-sxm')
    """
    plain = written.lower().replace("-", "_")
    name = CHIPS.get(plain, plain.replace("_", "-"))
    spellings = [name, *(name.removesuffix(board) for board in _BOARDS), f"{name}-sxm"]
    known = next((spelling for spelling in spellings if spelling in chip_names()), None)
    if known is None:
        raise UnpriceableError(f"chip {written!r} is not in the catalogue{nearest(name, chip_names())}")
    return known


def model_name(written: str) -> str:
    """Catalogue name of a released model; organisation, tuning and formats do not matter.

    Raises
    ------
    UnpriceableError
        If the catalogue has no such architecture.

    >>> model_name("meta-llama/Llama-3.3-70B-Instruct"), model_name("Qwen/Qwen3-235B-A22B-Instruct-2507-FP8")
    ('llama-3-70b', 'qwen3-235b-a22b')
    """
    known = dict.fromkeys(model_names()) | model_aliases()
    name = written.rpartition("/")[2].lower().removeprefix("meta-")
    while True:
        if name in known:
            return known[name] or name
        shorter = _RELEASES.sub("", name)
        if shorter == name:
            raise UnpriceableError(f"model {written!r} is not in the catalogue{nearest(name, known)}")
        name = shorter
