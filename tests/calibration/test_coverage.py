"""The residual is found where it was put, and intervals of rows hold what they promise."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest

from simulator.calibration.coverage import (
    Residual,
    coverage_document,
    drawn_log_ratios,
    estimate_left_out,
    fit_errors,
    fitted_profiles,
    free_covariance,
    kind_of,
    measure_coverage,
)
from simulator.calibration.harness import predict
from simulator.calibration.measurements import Measurement, Pool
from simulator.calibration.profiles import profile_text
from simulator.calibration.serving import Parameter, Simulators, fit_serving
from simulator.catalog.draws import Draws, student_quantile
from simulator.catalog.engines import EngineProfile, EngineSpec, load_engine
from simulator.catalog.files import parse
from simulator.randomness import normal, uniform
from simulator.reproduction.accuracy import coverage_rows, residual_rows, unfitted_coverage_rows

BASE = {"vllm": EngineProfile(name="vllm", max_num_seqs=64, max_num_batched_tokens=1024)}
PARAMETERS = (
    Parameter("weights_slowdown", None, 0.5, 3.0, 1.0, 0.3),
    Parameter("step_s", "vllm", 0.0, 10e-3, 0.5e-3, 2e-3),
    Parameter("sequence_s", "vllm", 0.0, 100e-6, 0.0, 50e-6),
)


def synthetic(scale, *, shared, rows=2000, groups=20, moves=0.0, n=32):
    """Rows whose residual is t₄ of ``scale``, a part of it common to a group, and whose draws move by ``moves``."""
    names = np.array([f"group {i % groups}" for i in range(rows)])
    common = normal(1, "common", 0, groups)[np.arange(rows) % groups]
    score = np.sqrt(shared) * common + np.sqrt(1 - shared) * normal(1, "own", 0, rows)
    # Placed by rank, so that the marginal is exact whatever the common part came out as.
    u = (np.argsort(np.argsort(score)) + 0.5) / rows
    truth = np.full((rows, 4), np.nan)
    truth[:, 0] = -scale * student_quantile(u, 4) - moves * normal(2, "move", 0, rows)
    drawn = moves * np.stack([normal(3, f"draw {k}", 0, rows) for k in range(n)], axis=-1)
    return Residual(names, truth, np.repeat(drawn[:, None, :], 4, axis=1))


@pytest.mark.parametrize("scale", [0.03, 0.1, 0.3])
def test_the_scale_of_a_residual_is_found(scale):
    found = estimate_left_out(synthetic(scale, shared=0.0), Draws(32))
    assert found.step_scale == pytest.approx(scale, rel=0.15)
    assert found.within_group < 0.15
    assert found.first_token_scale == 0  # no row has one


def test_what_draws_explain_is_no_residual():
    with_moves = estimate_left_out(synthetic(0.1, shared=0.0, moves=0.15), Draws(32))
    none_left = estimate_left_out(synthetic(0.0, shared=0.0, moves=0.15), Draws(32))
    assert with_moves.step_scale == pytest.approx(0.1, rel=0.3)
    assert none_left.step_scale < 0.05


def test_the_common_part_of_a_group_is_seen():
    assert estimate_left_out(synthetic(0.1, shared=0.7), Draws(32)).within_group > 0.4


def measured_rows(spread):
    """Four groups whose measurements are off by a factor of their own, and each row by one more."""
    truth = replace(BASE["vllm"], step_s=2e-3, weights_slowdown=1.2)
    found = []
    for i, (model, tp) in enumerate([("llama-3-8b", 1), ("qwen3-32b", 2), ("llama-3-70b", 4), ("mistral-7b-v0.1", 1)]):
        for clients in (1, 4, 16):
            for prompt in (128, 512):
                m = Measurement(
                    id=f"{model}-{clients}-{prompt}", table="t", model=model, chip="h100-sxm", engine="vllm", engine_version="1",
                    dtype="bf16", precision="bf16", pools=(Pool(tp=tp),), load="closed", clients=clients, prompt_tokens=prompt,
                    output_tokens=32, range_ratio=1.0, n_requests=2 * clients, measured={},
                )  # fmt: skip
                predicted = predict(m, truth)
                off = np.exp(spread * (uniform(i, "group", 0, 1)[0] - 0.5 + uniform(i, m.id, 0, 1)[0] - 0.5))
                found.append(replace(m, measured={k: off * predicted[k] for k in ("ttft_s", "tpot_s")}))
    return found


@pytest.fixture(scope="module")
def rows():
    return measured_rows(0.3)


@pytest.fixture(scope="module")
def fit(rows):
    with Simulators(rows, 1) as simulators:
        return fit_serving(rows, simulators=simulators, parameters=PARAMETERS, base=BASE)


@pytest.fixture(scope="module")
def coverage(rows, fit):
    elsewhere = [replace(m, chip="a100-80-sxm") for m in rows[:12]]
    with Simulators(rows, 1) as simulators:
        return measure_coverage(rows, fit, simulators=simulators, others=elsewhere, draws=Draws(16))


def test_the_residual_widens_intervals_to_what_they_promise(coverage):
    alone = {c.metric: c for c in coverage.parameters_only}
    for with_residual in coverage.groups[""]:
        before = alone[with_residual.metric]
        assert with_residual.half_width > before.half_width
        assert 0.6 <= with_residual.shares[0.8] <= 1
        shares = list(with_residual.shares.values())
        assert shares == sorted(shares)
    assert {c.metric for c in coverage.groups[""]} == {"tpot_s", "ttft_s", "output_tokens_per_s"}
    assert len(coverage.groups) == 5
    assert set(coverage.left_out) == {"dense"}


def test_other_chips_get_a_residual_from_their_own_rows(coverage):
    assert coverage.other_chips.rows == 12
    assert coverage.other_chips.groups == 2
    assert list(coverage.tables) == ["t, other chips"]


def test_parameters_at_a_bound_do_not_move(fit):
    at_bound = replace(fit, values=np.array([fit.values[0], fit.values[1], 0.0]))
    covariance = free_covariance(at_bound)
    assert covariance[2].tolist() == [0, 0, 0]
    assert covariance[0, 0] <= fit.covariance[0, 0] * (1 + 1e-9)
    drawn = fitted_profiles(at_bound, Draws(20))["vllm"]
    assert {p.sequence_s for p in drawn} == {0.0}
    assert len({p.step_s for p in drawn}) == 20


def test_drawn_rows_do_not_depend_on_workers(rows, fit):
    some, draws = rows[:8], Draws(3)
    profiles = fitted_profiles(fit, draws)
    names = ["vllm"] * len(some)
    one, two = (drawn_log_ratios(some, profiles, names, draws, workers=w) for w in (1, 2))
    assert np.array_equal(one, two, equal_nan=True)
    assert np.isfinite(one[:, 0]).all()
    assert (one[:, 0].std(axis=-1) > 0).all()


def test_a_profile_file_carries_its_errors_and_reads_back(fit, coverage):
    found = fit_errors(fit, "vllm", None, chips={"h100-sxm"}, coverage=coverage)
    text = profile_text(load_engine("vllm"), {}, command="test", errors=found)
    spec = parse(EngineSpec, tomllib.loads(text), "vllm.toml")
    assert spec.errors == found
    assert spec.errors.chips == ("h100-sxm",)
    assert "host.step" in spec.errors.parameters
    kept = fit_errors(fit, "vllm", found, chips={"h100-sxm"}, coverage=None)
    assert (kept.left_out, kept.other_chips) == (found.left_out, found.other_chips)


def test_the_page_has_a_row_for_every_figure(coverage):
    record = {"intervals": coverage_document(coverage)}
    assert len(coverage_rows(record)) == 2 * 3 + 4 * 3
    assert len(residual_rows(record)) == 2
    assert len(unfitted_coverage_rows(record)) == 3
    assert coverage_rows(record)[0][0] == "all"


def test_models_with_experts_are_a_kind_of_their_own():
    assert (kind_of("llama-3-8b"), kind_of("gpt-oss-120b")) == ("dense", "experts")
