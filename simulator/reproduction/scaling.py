"""Our side of the tables on loss laws, lifetime optima and training cost."""

import csv
import math
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files

import numpy as np

from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.economics.prices import chip_seconds_usd
from simulator.lifetime.demand import RegretTable, regret_table
from simulator.lifetime.optimum import LifetimeOptimum, TokenDemand, flop_price, optimum, sardana_optimum, serve
from simulator.reproduction.rows import Ours
from simulator.scaling import kaplan
from simulator.scaling.fits import Fit, Method, Runs, fit_loss_law, huber_objective
from simulator.scaling.laws import LossLaw, TrainingPoint, law
from simulator.scaling.overtraining import OvertrainingLaw, fit_overtraining, llama3_tokens, overtraining_law
from simulator.scaling.repeated import RepeatedDataLaw
from simulator.training.flops import (
    GptShape,
    attention_training_flops_per_token,
    hoffmann_sequence_flops,
    megatron_iteration_flops,
    megatron_parameters,
    mfu,
    recomputed_training_days,
    training_flops,
)
from simulator.training.memory import pipeline_idle_share, pipeline_overhead, zero_bytes_per_chip

Rows = dict[str, Callable[[], float]]

GOPHER_FLOPS = 5.76e23
TABLE_3 = {4e8: 1.92e19, 1e9: 1.21e20, 1e10: 1.23e22, 6.7e10: GOPHER_FLOPS, 1.75e11: 3.85e24, 2.8e11: 9.90e24}
TABLE_3 |= {5.2e11: 3.43e25, 1e12: 1.27e26, 1e13: 1.30e28}
TABLE_3_TOKENS = (8.0e9, 20.2e9, 205.1e9, 1.5e12, 3.7e12, 5.9e12, 11.0e12, 21.2e12, 216.2e12)
"""Parameters and FLOPs, and tokens, of Hoffmann et al. 2022, Table 3."""
A4_SHAPES = {
    "73M": (73e6, GptShape(10, 640, 2560, 10, 64)),
    "305M": (305e6, GptShape(20, 1024, 4096, 16, 64)),
    "552M": (552e6, GptShape(24, 1280, 5120, 10, 128)),
    "1.6B": (1.6e9, GptShape(28, 2048, 8192, 16, 128)),
    "6.8B": (6.8e9, GptShape(40, 3584, 14336, 28, 128)),
}
"""Models of Hoffmann et al. 2022, Table A4, with the shapes of Table A9 (recalled)."""
A100, A100_INT8, H100 = 312e12, 624e12, 989.4e12
TPU_V4 = 275e12
GPU_HOURS = {
    "llama-1-7b": (82_432, 1e12, A100, "llama-1-7b"),
    "llama-1-13b": (135_168, 1e12, A100, "llama-1-13b"),
    "llama-1-33b": (530_432, 1.4e12, A100, "llama-1-33b"),
    "llama-1-65b": (1_022_362, 1.4e12, A100, "llama-1-65b"),
    "llama-2-7b": (184_320, 2e12, A100, "llama-2-7b"),
    "llama-2-13b": (368_640, 2e12, A100, "llama-2-13b"),
    "llama-2-34b": (1_038_336, 2e12, A100, "codellama-34b"),
    "llama-2-70b": (1_720_320, 2e12, A100, "llama-2-70b"),
    "llama-3-8b": (1.3e6, 15e12, H100, "llama-3-8b"),
    "llama-3-70b": (6.4e6, 15e12, H100, "llama-3-70b"),
    "llama-3.1-8b": (1.46e6, 15e12, H100, "llama-3-8b"),
    "llama-3.1-70b": (7.0e6, 15e12, H100, "llama-3-70b"),
    "llama-3.1-405b": (30.84e6, 15.6e12, H100, "llama-3.1-405b"),
}
"""GPU-hours, tokens, peak and the catalogue's model of published runs; Llama 2's 34B has the shape of Code Llama's."""


def laws_ours() -> Ours:
    """Our side of ``data/scaling-laws.csv``."""
    return _kaplan() | _chinchilla() | _fits() | _sardana_fits() | _repeated() | _overtraining()


def _kaplan() -> Rows:
    b = kaplan
    combined = 1 / (1 / b.ALPHA_S + 1 / b.ALPHA_B + 1 / b.ALPHA_N)
    return {
        "kaplan-n": lambda: b.optimal_parameters(10.0) / b.optimal_parameters(1.0),
        "kaplan-d": lambda: 10**b.D_EXPONENT,
        "kaplan-ln1e9": lambda: b.loss_of_parameters(1e9),
        "kaplan-ln1e6": lambda: b.loss_of_parameters(1e6),
        "kaplan-ld": lambda: b.loss_of_tokens(23e9),
        "kaplan-lc": lambda: b.loss_of_compute(1.0),
        "kaplan-lnd": lambda: b.loss(1e9, 23e9),
        **{f"kaplan-b{x:g}": partial(b.critical_batch_tokens, x) for x in (4.0, 3.0, 2.5, 2.0)},
        "kaplan-c": lambda: combined,
        "kaplan-cn": lambda: combined / b.ALPHA_N,
        "kaplan-6nd": lambda: 1 / (1 + b.ALPHA_N2 / b.ALPHA_D2),
    }


def _chinchilla() -> Rows:
    ours: Rows = {}
    for name in ("hoffmann_tex", "hoffmann_rounded", "sardana", "besiroglu", "muennighoff_c4"):
        best = law(name).optimum(GOPHER_FLOPS, extrapolate=True)
        values = {"n": best.parameters, "d": best.tokens, "q": best.tokens_per_parameter, "l": best.loss}
        kept = values if name != "muennighoff_c4" else {"n": best.parameters, "d": best.tokens}
        ours |= {f"opt-{name}-{key}": partial(float, value) for key, value in kept.items()}
    for name in ("hoffmann_tex", "besiroglu"):
        for size, parameters, tokens in (("70", 70e9, 1.4e12), ("280", 280e9, 300e9), ("8", 8e9, 15e12)):
            ours[f"loss-{name}-{size}"] = partial(law(name).loss, parameters, tokens, extrapolate=True)
    log_c = np.log(list(TABLE_3.values()))
    for model, (parameters, shape) in A4_SHAPES.items():
        ours[f"a4-{model}"] = partial(_flops_over_6nd, parameters, shape)
    return ours | {
        "table3-n": lambda: float(np.polyfit(log_c, np.log(list(TABLE_3)), 1)[0]),
        "table3-d": lambda: float(np.polyfit(log_c, np.log(TABLE_3_TOKENS), 1)[0]),
        "table3-67b": lambda: training_flops(6.7e10, TABLE_3_TOKENS[3]) / TABLE_3[6.7e10],
    }


def _flops_over_6nd(parameters: float, shape: GptShape) -> float:
    return hoffmann_sequence_flops(shape, 2048, embeddings=False) / training_flops(parameters, 2048)


def _columns(table: str, *names: str) -> list[np.ndarray]:
    with (files("simulator.reproduction") / "data" / f"{table}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [np.array([float(row[name]) for row in rows]) for name in names]


@cache
def _epoch_runs(which: str) -> Runs:
    """Runs read off the Chinchilla figure (Besiroglu et al. 2024): all, without the five worst, or part of those."""
    parameters, flops, loss = _columns("runs_epoch", "parameters", "flops", "loss")
    runs = Runs(parameters, flops / 6 / parameters, loss)
    if which == "all":
        return runs
    kept = runs.take(loss < np.sort(loss)[-5])
    return {
        "240": lambda: kept,
        "high": lambda: kept.take(kept.flops > 1e20),
        "low": lambda: kept.take(kept.flops < 1e20),
    }[which]()


@cache
def _epoch_fit(which: str, method: Method) -> Fit:
    return fit_loss_law(_epoch_runs(which), method)


def _fits() -> Rows:
    ours: Rows = {}
    methods: tuple[Method, ...] = (
        "huber",
        "huber_mle",
        "log_least_squares",
        "least_squares",
        "student_t",
        "laplace",
    )
    for method in methods:
        for key in ("A", "B", "E", "alpha", "beta"):
            ours[f"fit-{method}-{key}"] = partial(_coefficient, "240", method, key)
        if method not in ("huber", "least_squares"):
            ours[f"fit-{method}-ll"] = partial(_likelihood, method)
    for which in ("all", "high", "low"):
        for key in ("A", "B", "E", "alpha", "beta"):
            ours[f"range-{which}-{key}"] = partial(_coefficient, which, "huber", key)
        ours[f"range-{which}-objective"] = partial(_objective, which)
    for which in ("high", "low"):
        ours[f"range-{which}-q"] = partial(_range_ratio, which)
    return ours | {
        "fit-huber-objective": lambda: _epoch_fit("240", "huber").objective,
        "fit-student_t-nu": lambda: _epoch_fit("240", "student_t").shape or math.nan,
    }


def _coefficient(which: str, method: Method, name: str) -> float:
    return float(getattr(_epoch_fit(which, method).law, name))


def _likelihood(method: Method) -> float:
    return _epoch_fit("240", method).log_likelihood or math.nan


def _objective(which: str) -> float:
    return _epoch_fit(which, "huber").objective


def _range_ratio(which: str) -> float:
    return _ratio_at_gopher(_epoch_fit(which, "huber").law)


def _ratio_at_gopher(fitted: LossLaw) -> float:
    return fitted.optimum(GOPHER_FLOPS, extrapolate=True).tokens_per_parameter


@cache
def _sardana_fit(limit: str) -> tuple[Runs, Fit]:
    parameters, tokens, loss = _columns("runs_sardana", "parameters", "tokens", "loss")
    most = math.inf if limit == "all" else float(limit) * 1.001  # sizes are rounded
    runs = Runs(parameters, tokens, loss).take(tokens / parameters <= most)
    return runs, fit_loss_law(runs)


def _sardana_fits() -> Rows:
    ours: Rows = {}
    for limit in ("100", "250", "500", "all"):
        ours |= {
            f"sardana-{limit}-{what}": partial(_sardana_row, limit, what)
            for what in ("alpha", "beta", "objective", "published", "q")
        }
    return ours


def _sardana_row(limit: str, what: str) -> float:
    runs, fit = _sardana_fit(limit)
    if what == "q":
        return _ratio_at_gopher(fit.law)
    if what == "objective":
        return fit.objective
    return huber_objective(law(f"sardana_{limit}"), runs) if what == "published" else float(getattr(fit.law, what))


def _repeated() -> Rows:
    repeated = RepeatedDataLaw()
    best = repeated.optimum(1e22, 25e9, extrapolate=True)

    def excess() -> float:
        return repeated.loss(2e11, 1e12, 1e12, extrapolate=True) - repeated.base.loss(2e11, 1e12, extrapolate=True)

    return {
        "repeat-1": lambda: repeated.loss(6.34e9, 242e9, 25e9),
        "repeat-2": lambda: repeated.loss(8.67e9, 178e9, 25e9),
        "repeat-opt-n": lambda: best[0],
        "repeat-opt-d": lambda: best[1],
        "repeat-opt-l": lambda: best[2],
        **{f"repeat-value-{e}": partial(repeated.effective_tokens, e, 1.0) for e in (2, 4, 8, 16, 40)},
        **{f"repeat-marginal-{e}": partial(repeated.marginal_value, e) for e in (4, 16)},
        **{f"repeat-epochs-{e}": partial(repeated.loss, 8.67e9, 178e9, 178e9 / e) for e in (1, 4, 7, 14, 44)},
        "repeat-excess": excess,
    }


@cache
def _openlm_fit(data: str) -> tuple[float, float, float, float]:
    """Fit to the five runs of the paper: four sizes at 20 tokens per parameter, the smallest at 320 as well."""
    parameters, tokens, loss = _columns("runs_openlm", "parameters", "tokens", "loss")
    with (files("simulator.reproduction") / "data/runs_openlm.csv").open(encoding="utf-8") as file:
        names = np.array([row["data"] for row in csv.DictReader(file)])
    ratio = np.round(tokens / parameters)
    kept = (names == data) & (((ratio == 20) & (parameters < 5e8)) | ((ratio == 320) & (parameters < 2e7)))
    return fit_overtraining((tokens / parameters)[kept], (6 * parameters * tokens)[kept], loss[kept])


def _overtraining() -> Rows:
    ours: Rows = {}
    for name, data in (("c4", "c4_original"), ("redpajama", "rpj"), ("refinedweb", "rw_original")):
        for place, key in enumerate(("E", "a", "b", "eta")):
            ours[f"gadre-{name}-{key}"] = partial(_openlm_coefficient, data, place)
    predict = overtraining_law("gadre_redpajama")
    return ours | {
        "gadre-1b": lambda: _error_pct(predict, 1439795200, 921468928000, 2.502053562117363),
        "gadre-7b": lambda: _error_pct(predict, 6889410560, 137788211200, 2.424993099368689),
        "llama3-d": lambda: llama3_tokens(3.8e25),
    }


def _openlm_coefficient(data: str, place: int) -> float:
    return _openlm_fit(data)[place]


def _error_pct(predict: OvertrainingLaw, parameters: float, tokens: float, measured: float) -> float:
    ours = predict.loss(tokens / parameters, training_flops(parameters, tokens), extrapolate=True)
    return 100 * (ours / measured - 1)


def lifetime_ours() -> Ours:
    """Our side of ``data/lifetime.csv``."""
    sardana = law("sardana")
    flops = sardana_optimum(sardana, 1.947, TokenDemand(2e12), extrapolate=True)
    plain = sardana.cheapest(1.947, extrapolate=True)
    plain_flops = serve(sardana, 1.947, plain.parameters, lambda n: 2 * n * 2e12, extrapolate=True)
    train_price = flop_price(1.40, A100, 0.5)
    int8 = TokenDemand(1e13, 2.5e12, flop_price(0.60, A100_INT8, 0.4), flop_price(0.60, A100_INT8, 0.2))
    usd = sardana_optimum(sardana, 1.947, int8, train_cost_per_flop=train_price, extrapolate=True)
    plain_usd = plain.flops * train_price + plain.parameters * int8.cost_per_parameter
    return (
        {
            "l-70b": lambda: sardana.loss(70e9, 1e12, extrapolate=True),
            "flop-n": lambda: flops.point.parameters,
            "flop-d": lambda: flops.point.tokens,
            "flop-rn": lambda: 100 * flops.point.parameters / plain.parameters,
            "flop-rd": lambda: 100 * flops.point.tokens / plain.tokens,
            "flop-rk": lambda: 100 * flops.total / plain_flops.total,
            "usd-n": lambda: usd.point.parameters,
            "usd-d": lambda: usd.point.tokens,
            "usd-rn": lambda: 100 * usd.point.parameters / plain.parameters,
            "usd-rd": lambda: 100 * usd.point.tokens / plain.tokens,
            "usd-rk": lambda: 100 * usd.total / plain_usd,
            "usd-usd": lambda: usd.total,
            "usd-usd0": lambda: plain_usd,
        }
        | _swaps(sardana)
        | _thirty_billion(sardana)
        | _regrets()
        | _chip_seconds()
    )


def _at_quality_of(coefficients: LossLaw, size: float, trained: float, tokens: float) -> LifetimeOptimum:
    """Serve tokens by a model of ``trained`` parameters that is as good as the compute-optimal one of ``size``."""
    quality = coefficients.optimum_for_parameters(size, extrapolate=True).loss
    return serve(coefficients, quality, trained, lambda n: 2 * n * tokens, extrapolate=True)


def _swaps(sardana: LossLaw) -> Rows:
    def saved(name: str) -> float:
        large, small = (_at_quality_of(law(name), 13e9, size, 2e12) for size in (13e9, 7e9))
        return 100 * (1 - small.total / large.total)

    large, small = (_at_quality_of(sardana, 13e9, size, 2e12) for size in (13e9, 7e9))
    seven = sardana.optimum_for_parameters(7e9, extrapolate=True)
    plain = _at_quality_of(sardana, 7e9, 7e9, 1e11)
    best = sardana_optimum(sardana, seven.loss, TokenDemand(1e11), extrapolate=True)
    return {
        "swap-d13": lambda: large.point.tokens,
        "swap-l": lambda: large.point.loss,
        "swap-d7": lambda: small.point.tokens,
        "swap-save": lambda: large.total - small.total,
        **{
            f"swap-{name}": partial(saved, name)
            for name in ("sardana", "hoffmann_tex", "hoffmann_rounded", "besiroglu")
        },
        "7b-n": lambda: best.point.parameters,
        "7b-d": lambda: best.point.tokens / seven.tokens,
        "7b-save": lambda: 100 * (1 - best.total / plain.total),
    }


def _thirty_billion(sardana: LossLaw) -> Rows:
    point = sardana.optimum_for_parameters(30e9, extrapolate=True)
    demand = TokenDemand(1.5e9 * 70, 1.5e9 * 215, 1 / 3 / 0.5, 1 / 3 / 0.01)
    best = sardana_optimum(sardana, point.loss, demand, train_cost_per_flop=1 / 0.5, extrapolate=True)
    plain = point.flops / 0.5 + point.parameters * demand.cost_per_parameter

    def training_usd(usd_per_hour: float) -> float:
        return chip_seconds_usd(point.flops / (H100_CODE * 0.5), usd_per_hour)

    return {
        "30b-d": lambda: point.tokens,
        "30b-l": lambda: point.loss,
        "30b-c": lambda: point.flops,
        "30b-n-served": lambda: best.point.parameters,
        "30b-d-served": lambda: best.point.tokens,
        "30b-save-served": lambda: 100 * (1 - best.total / plain),
        "30b-usd-train": lambda: training_usd(2.00),
        "30b-usd-train-true": lambda: training_usd(1.50),
    }


H100_CODE = 989e12
"""Peak in the code of Sardana et al. [FLOP/s]"""


def _chinchilla_quality() -> tuple[LossLaw, TrainingPoint]:
    besiroglu = law("besiroglu")
    return besiroglu, besiroglu.point(70e9, 1.4e12, extrapolate=True)


@cache
def _regret() -> RegretTable:
    besiroglu, chinchilla = _chinchilla_quality()
    return regret_table(besiroglu, chinchilla.loss, (0.0, 1e12, 1e13, 1e14), (1e12, 1e13, 1e14))


def _regrets() -> Rows:
    ours: Rows = {}
    for i, choice in enumerate(("0", "1e12", "1e13", "1e14")):
        ours[f"regret-{choice}-n"] = partial(_regret_size, i)
        for j, truth in enumerate(("1e12", "1e13", "1e14")):
            ours[f"regret-{choice}-{truth}"] = partial(_regret_ratio, i, j)
    return ours


def _regret_size(choice: int) -> float:
    return float(_regret().parameters[choice]) / 1e9


def _regret_ratio(choice: int, truth: int) -> float:
    return float(_regret().ratios[choice, truth])


def _chip_seconds() -> Rows:
    besiroglu, chinchilla = _chinchilla_quality()
    price = flop_price(2.0, H100_CODE, 0.4)

    @cache
    def best(eta: float) -> LifetimeOptimum:
        def serving_usd(parameters: float) -> float:
            return chip_seconds_usd(2e9 * 0.05 * (parameters / 7e9) ** eta, 2.0)

        return optimum(besiroglu, chinchilla.loss, serving_usd, train_cost_per_flop=price, extrapolate=True)

    return {
        "chip-0-n": lambda: best(0).point.parameters,
        "chip-0-usd": lambda: best(0).total,
        "chip-1-n": lambda: best(1).point.parameters,
        "chip-1-d": lambda: best(1).point.tokens,
        "chip-1-train": lambda: best(1).training,
        "chip-1-serve": lambda: best(1).serving,
        "chip-smallest": lambda: besiroglu.smallest_parameters(chinchilla.loss),
    }


def training_ours() -> Ours:
    """Our side of ``data/training.csv``."""
    gpt3, bert = training_flops(174.6e9, 300e9), training_flops(109e6, 250e9)
    palm_speed = 238.3e3 / 6144

    def palm_mfu(attention: bool) -> float:
        per_token = training_flops(540.35e9, 1)
        per_token += attention_training_flops_per_token(118, 48, 256, 2048) if attention else 0.0
        return 100 * mfu(per_token * palm_speed, 1.0, TPU_V4)

    def implied(name: str) -> float:
        hours, tokens, peak, model = GPU_HOURS[name]
        return 100 * mfu(training_flops(count(load_model(model)).total, tokens), hours * 3600, peak)

    return {
        "gpt3": lambda: gpt3,
        "gpt3-pf": lambda: gpt3 / kaplan.PF_DAY_FLOPS,
        "bert": lambda: bert,
        "gpt3-bert": lambda: training_flops(175e9, 300e9) / bert,
        "palm": lambda: training_flops(540.35e9, 780e9),
        "palm-mfu": partial(palm_mfu, attention=True),
        "palm-mfu0": partial(palm_mfu, attention=False),
        "gopher": lambda: training_flops(280e9, 300e9),
        "chinchilla": lambda: training_flops(70e9, 1.4e12),
        "meg-175": lambda: recomputed_training_days(175e9, 300e9, 1024, 140e12),
        "meg-1t": lambda: recomputed_training_days(1e12, 450e9, 3072, 163e12),
        "meg-iter": lambda: megatron_iteration_flops(1536, 2048, 96, 12288, 51200),
        "meg-p": lambda: megatron_parameters(96, 12288, 51200, 2048),
        **{f"mfu-{name}": partial(implied, name) for name in GPU_HOURS},
        "mfu-deepseek-v3": lambda: 100 * mfu(training_flops(37e9, 14.8e12), 2.664e6 * 3600, H100),
        **{
            f"zero-{size}-{ways}-{stage}": partial(_zero_gb, float(size), ways, stage)
            for size in ("7.5", "128", "1000")
            for ways in (1, 4, 16, 64, 256, 1024)
            for stage in (1, 2, 3)
        },
        "pipe-idle": lambda: pipeline_idle_share(8, 32),
        "pipe-over": lambda: pipeline_overhead(8, 32),
        "pipe-inter": lambda: pipeline_overhead(8, 32, interleaved=4),
    }


def _zero_gb(billions: float, ways: int, stage: int) -> float:
    return zero_bytes_per_chip(billions, ways, stage)  # type: ignore[arg-type]  # stage runs over 1, 2, 3
