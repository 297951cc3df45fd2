"""Readers of measured serving tables: a file or folder → measurements, and the rows that cannot be simulated with the reason.

A table is known by its columns, not by its name:

===========================  =========================================================================================
aggregated serving rows      one closed-loop run per row: ``concurrency``, ``isl``, ``osl``, ``ttft_ms``, ``tpot_ms`` …
disaggregated serving rows   as above, with a prefill and a decode pool
offline throughput           ``num_requests`` queued at once, ``out_tok_s``
static batches, first token  ``batch`` requests at once: ``out_tok_s`` or ``first_token_ms``
client benchmarks            ``tpu_recipes``-like rows of a client with ``num_prompts`` and ``concurrency``
per-request logs             arrivals and token times of every request, replayed; needs a description beside it
``vllm bench serve`` JSON    what ``--save-result`` writes; needs a description beside it
===========================  =========================================================================================

The *description* of a log is a TOML file of the same name (``run.csv`` and ``run.toml``) with ``model``, ``slice``,
``precision``, ``engine`` and what else :class:`Description` has. Lengths of closed-loop tables are uniform in
[0.8 L, L], as their clients draw them, unless the row says that they are fixed.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from simulator.calibration.measurements import Measurement, Pool, chip_name, model_name
from simulator.calibration.recipes import launched
from simulator.catalog.engines import engine_names
from simulator.catalog.files import parse, read_toml
from simulator.catalog.records import Record
from simulator.catalog.slices import resolve_slice
from simulator.engine.records import Requests
from simulator.errors import ChipsecondsError, InputError, UnpriceableError, nearest

Row = Mapping[str, str]

RANGE_RATIO = 0.8
"""Shortest over longest length of closed-loop tables; the README of the published dumps states it."""
PROMPTS_PER_CLIENT = 10
"""Requests of a closed-loop run, per client; as above."""

ON_DEFAULTS = "nvidia_internal_gap_analysis"
"""Subset of the published dump that was measured on the engines' defaults, with fixed lengths for these models."""
PUBLISHED = ("inferencex", ON_DEFAULTS)
"""Subsets whose runs were launched by published recipes; of the second, those with lengths that are not fixed."""
FIXED_LENGTHS = {"llama-3-8b", "llama-3-70b", "qwen3-32b", "qwen3-235b-a22b"}

#: Engine profile by the engine's name in tables.
ENGINES = {"trtllm": "tensorrt-llm", "vllm-tpu": "vllm", "tensorrt": "tensorrt-llm"}


@dataclass(frozen=True)
class Unsupported:
    """A row that is not simulated, and why."""

    id: str
    table: str
    reason: str


@dataclass(frozen=True)
class Data:
    """What a file or folder holds."""

    measurements: tuple[Measurement, ...]
    unsupported: tuple[Unsupported, ...]

    @property
    def n_rows(self) -> int:
        """Rows of all tables that are meant to be simulated."""
        return len(self.measurements) + len(self.unsupported)


class Description(Record):
    """What a log or client result does not say about the server: the TOML file beside it."""

    schema_version: int = 1
    model: str
    slice: str
    precision: str = "bf16"
    engine: str = "vllm"
    engine_version: str = ""
    max_num_seqs: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    range_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Shortest over longest length of a client's random requests."""
    prompt_tokens: PositiveInt | None = None
    output_tokens: PositiveInt | None = None
    """Longest request of a client's random data; None: the mean that the result states."""


def read_measurements(path: Path) -> Data:
    """Read every table of a file or a folder; other files in a folder are passed over.

    Raises
    ------
    InputError
        If there is no such file, a file named on its own is no known table, or nothing is found.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = sorted(f for f in path.iterdir() if f.suffix in {".csv", ".json"}) if path.is_dir() else [path]
    found: list[Measurement] = []
    refused: list[Unsupported] = []
    known = 0
    for file in files:
        results = _read_file(file)
        if results is None:
            if not path.is_dir():
                raise InputError(f"{file}: not a known table of serving measurements; its columns match no reader")
            continue
        known += 1
        for result in results:
            if isinstance(result, Measurement):
                found.append(result)
            else:
                refused.append(result)
    if not known:
        raise InputError(f"{path}: no table of serving measurements among {len(files)} .csv and .json files")
    return Data(tuple(found), tuple(refused))


Found = Iterator[Measurement | Unsupported]


def _read_file(file: Path) -> list[Measurement | Unsupported] | None:
    if file.suffix == ".json":
        return _client_result(file)
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        columns = set(reader.fieldnames or ())
        rows = list(reader)
    if {"first_token_s", "last_token_s", "input_tokens", "output_tokens"} <= columns:
        return _log(file, rows)
    for needed, read in _READERS:
        if needed <= columns:
            return list(_each(file.stem, rows, read))
    return None


def _each(table: str, rows: list[dict[str, str]], read: Callable[[str, str, Row], Measurement]) -> Found:
    for i, row in enumerate(rows):
        identity = row.get("id") or f"{table}:{i + 1}"
        try:
            yield read(identity, table, row)
        except ChipsecondsError as error:
            yield Unsupported(identity, table, str(error))
        except (KeyError, ValueError) as error:
            raise InputError(f"{table}, row {i + 1}: {error!r}") from None


def _count(row: Row, name: str, default: int = 1) -> int:
    """A count that a table may have written as a float, or not at all."""
    return int(float(row.get(name) or default))


def engine_profile_name(written: str) -> str:
    """Catalogue name of an engine as tables spell it.

    Raises
    ------
    UnpriceableError
        If there is no profile for it.

    >>> engine_profile_name("trtllm")
    'tensorrt-llm'
    """
    plain = written.lower().split(" ")[0].split(",")[0]
    name = ENGINES.get(plain, plain)
    if name not in engine_names():
        raise UnpriceableError(f"engine {written!r} has no profile{nearest(name, engine_names())}")
    return name


def serving_precision(row: Row, model: str, chip: str) -> str:
    """Precision of a serving row: formats of weights and products as released for the model, the cache as served.

    Raises
    ------
    UnpriceableError
        If the formats are not known.

    >>> serving_precision({"precision": "fp8", "gemm_quant": "fp8_block"}, "deepseek-v3", "h200-sxm")
    'fp8kv8g128'
    """
    word = row["precision"].lower()
    blocks = "fp8_block" in {row.get("gemm_quant"), row.get("moe_quant")}
    # The cache of published recipes is FP8 with FP8 weights; in runs on defaults it follows the model's 16 bits.
    kv = "" if row.get("subset") == ON_DEFAULTS and blocks else "kv8"
    match word:
        case "bf16" | "fp16":
            return word
        case "fp4" | "nvfp4" | "mxfp4" | "fp8" if model.startswith("gpt-oss"):
            # Released with 4-bit experts alone; the products' inputs are FP8 on newer chips, or where the table says so.
            narrow = word == "fp8" or chip.startswith(("b200", "b300", "gb200", "gb300"))
            return "wmxfp4afp8-experts" if narrow else "mxfp4-experts"
        case "fp8":
            return f"fp8{kv}g128" if blocks or model in FP8_BLOCK_MODELS else f"fp8{kv}"
        case "fp4" | "nvfp4":
            return "nvfp4kv8"
        case "int4" if model.startswith("kimi"):
            return "int4g32-experts"
        case "int4":
            return "int4"
        case _:
            raise UnpriceableError(f"precision {row['precision']!r} of {model} is not known")


#: Models released in FP8 with a scale per 128 x 128 weights.
FP8_BLOCK_MODELS = {"deepseek-v3", "minimax-m2.5", "qwen3-235b-a22b", "glm-5", "qwen3.5-397b-a17b"}


def _pool(tp: int, pp: int, dp: int, ep: int) -> Pool:
    """Sharding of one engine: experts are spread over all of its chips or split like everything else."""
    if dp > 1 and ep not in {1, tp * dp}:
        raise UnpriceableError(f"experts over {ep} of {tp * dp} chips with attention ranks are not priced")
    if dp > 1 and ep == 1:
        raise UnpriceableError(f"{dp} attention ranks with experts split inside (ep = 1) are not priced")
    # Experts partly spread and partly split: priced as spread over all chips.
    return Pool(tp=tp, pp=pp, dp=dp, ep=tp * dp if ep > 1 else 1)


def _aggregated(identity: str, table: str, row: Row) -> Measurement:
    model, chip, engine = model_name(row["model"]), chip_name(row["gpu"]), engine_profile_name(row["engine"])
    pool = _pool(_count(row, "tp"), _count(row, "pp"), _count(row, "attention_dp"), _count(row, "moe_ep"))
    if pool.chips != _count(row, "n_gpus"):
        raise UnpriceableError(
            f"tp x pp x dp = {pool.chips} on {_count(row, 'n_gpus')} chips: the row contradicts itself"
        )
    clients = _count(row, "concurrency")
    fixed = row.get("subset") == ON_DEFAULTS and model in FIXED_LENGTHS
    if fixed:
        # Their TTFT does not depend on the output length, which takes steps that hold one prompt and the decodes, no more.
        pool = replace(pool, max_num_seqs=512, max_num_batched_tokens=_count(row, "isl") + clients)
    measured = {"ttft_s": float(row["ttft_ms"]) / 1e3, "tpot_s": float(row["tpot_ms"]) / 1e3}
    measured = with_throughput(measured, clients, _count(row, "osl"))
    if fixed and engine == "tensorrt-llm":
        # Its TTFT grows with the output length, which no steady server does: start-up requests weigh in.
        del measured["ttft_s"], measured["output_tokens_per_s"]
    run = Measurement(
        id=identity,
        table=table,
        model=model,
        chip=chip,
        engine=engine,
        engine_version=row.get("engine_version", ""),
        dtype=row["precision"],
        precision=serving_precision(row, model, chip),
        pools=(pool,),
        load="closed",
        clients=clients,
        prompt_tokens=_count(row, "isl"),
        output_tokens=_count(row, "osl"),
        range_ratio=1.0 if fixed else RANGE_RATIO,
        n_requests=PROMPTS_PER_CLIENT * clients,
        measured=measured,
    )
    published = row.get("subset", "").startswith(PUBLISHED) and not fixed
    return launched(run) if published else run


def with_throughput(measured: Mapping[str, float], clients: int, output_tokens: int) -> dict[str, float]:
    """Add the output rate that follows from a closed loop's mean latencies, where the table has none. [tokens/s]"""
    latency_s = measured["ttft_s"] + (output_tokens - 1) * measured["tpot_s"]
    return {"output_tokens_per_s": clients * output_tokens / latency_s} | dict(measured)


def _disaggregated(identity: str, table: str, row: Row) -> Measurement:
    model, chip = model_name(row["model"]), chip_name(row["gpu"])
    pools = []
    for role in ("prefill", "decode"):
        pool = _pool(
            *(_count(row, f"{role}_{name}") for name in ("tp_size", "pp_size", "attention_dp_size", "moe_ep_size"))
        )
        if row.get(f"{role}_gpus_per_worker") and pool.chips != _count(row, f"{role}_gpus_per_worker"):
            raise UnpriceableError(
                f"{role}: {pool} is not {row[f'{role}_gpus_per_worker']} chips: the row contradicts itself"
            )
        pools.append(replace(pool, workers=_count(row, f"{role}_num_workers")))
    clients = _count(row, "concurrency")
    measured = {"ttft_s": float(row["ttft_ms"]) / 1e3, "tpot_s": float(row["tpot_ms"]) / 1e3}
    run = Measurement(
        id=identity,
        table=table,
        model=model,
        chip=chip,
        engine=engine_profile_name(row["engine"]),
        engine_version=row.get("engine_version", ""),
        dtype=row["precision"],
        precision=serving_precision(row, model, chip),
        pools=tuple(pools),
        load="closed",
        clients=clients,
        prompt_tokens=_count(row, "isl"),
        output_tokens=_count(row, "osl"),
        range_ratio=RANGE_RATIO,
        n_requests=PROMPTS_PER_CLIENT * clients,
        measured=with_throughput(measured, clients, _count(row, "osl")),
    )
    return launched(run) if row.get("subset", "").startswith(PUBLISHED[0]) else run


def _offline(identity: str, table: str, row: Row) -> Measurement:
    model, chip = model_name(row["model"]), chip_name(row["gpu"])
    dp, ep = _count(row, "attention_dp"), _count(row, "moe_ep")
    return Measurement(
        id=identity,
        table=table,
        model=model,
        chip=chip,
        engine=engine_profile_name(row["engine"]),
        engine_version=row.get("engine_version", ""),
        dtype=row["precision"],
        precision=serving_precision(row, model, chip),
        pools=(_pool(_count(row, "tp"), _count(row, "pp"), dp, max(ep, dp)),),
        load="queued",
        clients=0,
        prompt_tokens=_count(row, "isl"),
        output_tokens=_count(row, "osl"),
        range_ratio=1.0,
        n_requests=_count(row, "num_requests"),
        measured={"output_tokens_per_s": float(row["out_tok_s"])},
    )


def _static_batch(identity: str, table: str, row: Row) -> Measurement:
    output = {**row, "num_requests": row["batch"]}
    first = "first_token_ms" in row
    run = _offline(identity, table, {**output, "osl": "1", "out_tok_s": "1"} if first else output)
    batch = _count(row, "batch")
    limits = replace(run.pools[0], max_num_seqs=batch)
    measured = {"ttft_s": float(row["first_token_ms"]) / 1e3} if first else run.measured
    return replace(run, pools=(limits,), measured=measured)


def _client_row(identity: str, table: str, row: Row) -> Measurement:
    model, chip = model_name(row["model"]), chip_name(row["gpu"])
    precision = row["precision"].lower()
    pool = Pool(
        tp=_count(row, "n_gpus"),
        max_num_seqs=_count(row, "max_num_seqs"),
        max_num_batched_tokens=_count(row, "max_num_batched_tokens"),
    )
    names = {"ttft_s": "ttft_mean_ms", "tpot_s": "tpot_mean_ms"}
    measured = {metric: float(row[name]) / 1e3 for metric, name in names.items() if row.get(name)}
    measured["output_tokens_per_s"] = float(row["out_tok_s"])
    return Measurement(
        id=identity,
        table=table,
        model=model,
        chip=chip,
        engine=engine_profile_name(row["engine"]),
        engine_version=row.get("engine_version", ""),
        dtype=precision.split(" ")[0],
        precision="fp8kv8" if precision.startswith("fp8") and "kv" in precision else precision.split(" ")[0],
        pools=(pool,),
        load="closed",
        clients=_count(row, "concurrency"),
        prompt_tokens=_count(row, "isl"),
        output_tokens=_count(row, "osl"),
        range_ratio=1.0 if _count(row, "fixed_lengths", 1) else RANGE_RATIO,
        n_requests=_count(row, "num_prompts"),
        measured=measured,
    )


@dataclass(frozen=True)
class Benchmark:
    """What an MLPerf log does not say about its benchmark.

    Attributes
    ----------
    model, precision
        catalogue name, and the formats of closed submissions with TensorRT.
    prompt_tokens
        mean, assumed: logs have no input lengths.
    output_tokens
        mean, where a log has none.
    sharding
        tp and pp of one engine, assumed: the fewest chips that hold the weights and a cache beside them, as pipeline stages where PCIe is all that
        links them.
    beams
        of the beam search that the benchmark's rules ask for (recalled).
    """

    model: str
    precision: str
    prompt_tokens: int
    output_tokens: int
    sharding: Mapping[str, tuple[int, int]]
    beams: int = 1


#: Outputs: 294 in the reference of llama2-70b, at most 128 of the summaries, of which logs report 69.
MLPERF = {
    "llama2-70b": Benchmark(
        "llama-2-70b", "fp8kv8", 300, 294, {"l40s": (1, 4), "h100-sxm": (2, 1), "h100-nvl": (2, 1), "h100-pcie": (2, 1)}
    ),
    "gptj": Benchmark("gpt-j-6b", "fp8kv8", 780, 69, {}, beams=4),
}
SHORTEST = 0.02
"""Shortest over longest request of texts, whose lengths are spread from a few tokens to twice the mean."""


def _mlperf(identity: str, table: str, row: Row) -> Measurement:
    """A submission with TensorRT; the requests of its Server scenario are a Poisson process."""
    name = row["benchmark"].rsplit("-", 1)[0]
    known, chip = MLPERF.get(name), chip_name(row["gpu"])
    if known is None:
        raise UnpriceableError(f"benchmark {row['benchmark']!r} is not known{nearest(name, MLPERF)}")
    if not row["framework"].startswith("TensorRT"):
        raise UnpriceableError(
            f"{name} with {row['framework'] or 'an unnamed engine'}: the log does not say its formats"
        )
    tp, pp = known.sharding.get(chip, (1, 1))
    tp, pp = _count(row, "tp", tp), _count(row, "pp", 1 if row["tp"] else pp)
    workers = max(1, _count(row, "n_gpus") // (tp * pp))
    pool = Pool(workers=workers, tp=tp, pp=pp, max_num_seqs=_limit(row))
    output = round(float(row.get("mean_output_tokens") or known.output_tokens))
    queued = row["scenario"] == "Offline"
    if not (row["samples_per_s"] or row["target_qps"]):
        raise UnpriceableError(f"{name}, {row['scenario']}: the log has no rate")
    rate = float(row["samples_per_s"] or row["target_qps"]) * pool.workers * pool.chips / _count(row, "n_gpus")
    measured = {"output_tokens_per_s": rate * output} if queued else {}
    for metric, column in (("ttft_s", "ttft_mean_ms"), ("tpot_s", "tpot_mean_ms")):
        if not queued and row.get(column):
            measured[metric] = float(row[column]) / 1e3
    if not measured:
        raise UnpriceableError(
            f"{name}, {row['scenario']}: the log has no latency of tokens, and its rate is the arrivals'"
        )
    return Measurement(
        id=identity,
        table=table,
        model=known.model,
        chip=chip,
        engine="tensorrt-llm",
        engine_version=row["framework"].split(",")[0],
        dtype="fp8",
        precision=known.precision,
        pools=(pool,),
        load="queued" if queued else "poisson",
        clients=0,
        prompt_tokens=round(2 * known.prompt_tokens / (1 + SHORTEST)),
        output_tokens=round(2 * output / (1 + SHORTEST)),
        range_ratio=SHORTEST,
        n_requests=max(_count(row, "sample_count"), 0 if queued else math.ceil(rate * float(row["min_duration_s"]))),
        rate_per_s=rate,
        beams=known.beams,
        measured=measured,
    )


def _limit(row: Row) -> int | None:
    return _count(row, "max_batch") if row.get("max_batch") else None


def _kv_transfer(identity: str, table: str, row: Row) -> Measurement:
    del identity, table
    chip_name(row["gpu"])
    raise UnpriceableError("KV transfer times are not simulated")


_READERS: list[tuple[set[str], Callable[[str, str, Row], Measurement]]] = [
    ({"prefill_num_workers", "decode_num_workers", "ttft_ms", "tpot_ms"}, _disaggregated),
    ({"isl", "osl", "concurrency", "ttft_ms", "tpot_ms", "gpu"}, _aggregated),
    ({"num_prompts", "concurrency", "ttft_mean_ms", "gpu"}, _client_row),
    ({"isl", "osl", "num_requests", "out_tok_s", "gpu"}, _offline),
    ({"isl", "osl", "batch", "out_tok_s", "gpu"}, _static_batch),
    ({"isl", "batch", "first_token_ms", "gpu"}, _static_batch),
    ({"benchmark", "samples_per_s", "scenario", "gpu"}, _mlperf),
    ({"kv_transfer_ms", "gpu"}, _kv_transfer),
]


def _description(file: Path) -> Description | None:
    beside = file.with_suffix(".toml")
    if beside.is_file():
        return parse(Description, read_toml(beside), str(beside))
    for summary in sorted(file.parent.glob("*summary.csv")):
        with summary.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                if row.get("case") == file.stem:
                    return Description(
                        model=model_name(row["model"]),
                        slice=f"{chip_name(row['gpu'])}:{_count(row, 'n_gpus')}",
                        precision=row["dtype"],
                        engine=engine_profile_name(row["engine"]),
                        engine_version=row["engine_version"],
                        max_num_seqs=_count(row, "max_num_seqs"),
                        max_num_batched_tokens=_count(row, "max_num_batched_tokens"),
                    )
    return None


def _described(file: Path, about: Description, **values: Any) -> Measurement:
    a_slice = resolve_slice(about.slice)
    pool = Pool(
        tp=a_slice.n_chips, max_num_seqs=about.max_num_seqs, max_num_batched_tokens=about.max_num_batched_tokens
    )
    return Measurement(
        id=file.stem,
        table=file.stem,
        model=model_name(about.model),
        chip=a_slice.chip.name,
        engine=about.engine,
        engine_version=about.engine_version,
        dtype=about.precision,
        precision=about.precision,
        pools=(pool,),
        **values,
    )


NO_DESCRIPTION = "no description of the server: write {} with model, slice, precision and engine"


def _log(file: Path, rows: list[dict[str, str]]) -> list[Measurement | Unsupported]:
    """A per-request log, replayed with its own arrivals."""
    about = _description(file)
    if about is None:
        return [Unsupported(file.stem, file.stem, NO_DESCRIPTION.format(file.with_suffix(".toml").name))]
    arrival = "queued_s" if "queued_s" in rows[0] else "arrival_s"
    rows = sorted(rows, key=lambda row: float(row[arrival]))

    def column(name: str) -> NDArray[np.float64]:
        return np.array([float(row.get(name) or 0) for row in rows])

    arrival_s = np.maximum(column(arrival), 0.0)
    prompt, output = (column(name).astype(np.int64) for name in ("input_tokens", "output_tokens"))
    hits = column("prefix_hit_tokens_upper_bound").astype(np.int64)
    first, last = column("first_token_s"), column("last_token_s")
    several = output > 1
    requests = Requests(arrival_s, prompt, output, np.minimum(hits, prompt - 1), output)
    return [
        _described(
            file,
            about,
            load="replay",
            clients=0,
            prompt_tokens=int(prompt.max()),
            output_tokens=int(output.max()),
            range_ratio=1.0,
            n_requests=len(rows),
            measured=latency_metrics(
                first - arrival_s, (last - first)[several] / (output - 1)[several], last - arrival_s
            )
            | {"output_tokens_per_s": float(output.sum() / (last.max() - arrival_s.min()))},
            replay=requests,
        )
    ]


def latency_metrics(
    ttft_s: NDArray[np.float64], tpot_s: NDArray[np.float64], e2e_s: NDArray[np.float64], *, quantiles: bool = True
) -> dict[str, float]:
    """Means of per-request latencies, and with ``quantiles`` medians and 90th percentiles. [s]"""
    found = {}
    for name, values in (("ttft_s", ttft_s), ("tpot_s", tpot_s), ("e2e_s", e2e_s)):
        if len(values):
            found[name] = float(values.mean())
            if quantiles:
                found |= {f"{name}_p{p}": float(np.quantile(values, p / 100)) for p in (50, 90)}
    return found


def _client_result(file: Path) -> list[Measurement | Unsupported] | None:
    """What ``vllm bench serve --save-result`` writes: one JSON object of totals and latencies in ms."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(result, dict) or not {"num_prompts", "mean_ttft_ms", "mean_tpot_ms"} <= set(result):
        return None
    about = _description(file)
    if about is None:
        return [Unsupported(file.stem, file.stem, NO_DESCRIPTION.format(file.with_suffix(".toml").name))]
    n = int(result["num_prompts"])
    clients = result.get("max_concurrency")
    rate = float(result.get("request_rate") or "inf")
    names = ("ttft", "tpot")
    measured = {f"{name}_s": float(result[f"mean_{name}_ms"]) / 1e3 for name in names}
    if result.get("mean_e2el_ms"):
        measured["e2e_s"] = float(result["mean_e2el_ms"]) / 1e3
    measured["output_tokens_per_s"] = float(result["output_throughput"])
    # Random lengths: the mean of [r L, L] is (1 + r) L / 2.
    longest = 2 / (1 + about.range_ratio)
    return [
        _described(
            file,
            about,
            load="poisson" if rate < float("inf") else "closed" if clients else "queued",
            clients=int(clients or 0),
            rate_per_s=rate if rate < float("inf") else 0.0,
            prompt_tokens=about.prompt_tokens or round(longest * result["total_input_tokens"] / n),
            output_tokens=about.output_tokens or round(longest * result["total_output_tokens"] / n),
            range_ratio=about.range_ratio,
            n_requests=n,
            measured=measured,
        )
    ]
