"""The fit finds what it should, says what it cannot, and leaves out what it says it leaves out."""

import datetime as dt
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from simulator.calibration.harness import predict
from simulator.calibration.measurements import Measurement, Pool
from simulator.calibration.profiles import fitted_quantities, profile_text
from simulator.calibration.report import calibrate_serving
from simulator.calibration.serving import Parameter, Simulators, fit_serving, log_ratios, parameters_for
from simulator.calibration.splits import leave_out, noise_floor, ranking, setup, split_parts
from simulator.calibration.tables import Data, Unsupported
from simulator.calibration.validate import error_summary, validate
from simulator.catalog.engines import EngineProfile, EngineSpec, load_engine
from simulator.catalog.files import parse
from simulator.errors import InputError

BASE = {"vllm": EngineProfile(name="vllm", max_num_seqs=64, max_num_batched_tokens=1024)}
TRUTH = replace(BASE["vllm"], step_s=2e-3, sequence_s=20e-6, request_s=30e-3, weights_slowdown=1.3)
PARAMETERS = (
    Parameter("weights_slowdown", None, 0.5, 3.0, 1.0, 0.3),
    Parameter("step_s", "vllm", 0.0, 10e-3, 0.5e-3, 2e-3),
    Parameter("sequence_s", "vllm", 0.0, 100e-6, 0.0, 50e-6),
    Parameter("request_s", "vllm", 0.0, 0.5, 10e-3, 50e-3),
)


def rows_of(truth):
    found = []
    for model, tp in (("llama-3-8b", 1), ("llama-3-8b", 2), ("qwen3-32b", 2)):
        for clients in (2, 8, 32):
            for prompt, output in ((200, 40), (600, 60)):
                m = Measurement(
                    id=f"{model}-{tp}-{clients}-{prompt}", table="t", model=model, chip="h100-sxm", engine="vllm", engine_version=f"0.{tp}",
                    dtype="bf16", precision="bf16", pools=(Pool(tp=tp),), load="closed", clients=clients, prompt_tokens=prompt,
                    output_tokens=output, range_ratio=0.8, n_requests=4 * clients, measured={},
                )  # fmt: skip
                predicted = predict(m, truth)
                found.append(replace(m, measured={k: predicted[k] for k in ("ttft_s", "tpot_s")}))
    return found


@pytest.fixture(scope="module")
def rows():
    return rows_of(TRUTH)


@pytest.fixture(scope="module")
def fit(rows):
    with Simulators(rows, 1) as simulators:
        return fit_serving(rows, simulators=simulators, parameters=PARAMETERS, base=BASE)


def test_the_fit_recovers_the_parameters_that_made_the_rows(fit):
    found = {p.field: v for p, v in zip(fit.parameters, fit.values, strict=True)}
    for name, value in found.items():
        assert value == pytest.approx(getattr(TRUTH, name), rel=0.05), name
    assert np.nanmax(np.abs(fit.after)) < 0.01 < np.nanmedian(np.abs(fit.before))
    assert np.isfinite(fit.errors).all()


def test_an_outlier_does_not_move_the_fit(rows, fit):
    spoilt = [replace(rows[0], measured={"ttft_s": 50.0, "tpot_s": 5.0}), *rows[1:]]
    with Simulators(spoilt, 1) as simulators:
        robust = fit_serving(spoilt, simulators=simulators, parameters=PARAMETERS, base=BASE)
    assert robust.values == pytest.approx(fit.values, rel=0.15, abs=5e-6)


def test_bounds_hold_and_are_reported(rows):
    tight = [replace(p, high=1.1) if p.field == "weights_slowdown" else p for p in PARAMETERS]
    with Simulators(rows, 1) as simulators:
        found = fit_serving(rows, simulators=simulators, parameters=tight, base=BASE)
    assert found.values[0] == pytest.approx(1.1)
    assert any("weights_slowdown" in w and "bound" in w for w in found.warnings)


def test_what_no_row_shows_is_called_hardly_identified(rows):
    extra = (*PARAMETERS, Parameter("experts_slowdown", None, 0.5, 3.0, 1.0, 0.15))
    with Simulators(rows, 1) as simulators:
        found = fit_serving(rows, simulators=simulators, parameters=extra, base=BASE)
    assert found.values[-1] == pytest.approx(1.0)
    assert any("experts_slowdown is hardly identified" in w for w in found.warnings)


def test_processes_give_the_same_numbers(rows):
    few = rows[::5]
    with Simulators(few, 2) as parallel:
        assert np.array_equal(parallel.evaluate([BASE])[0], log_ratios(few, BASE), equal_nan=True)


def test_splits_leave_whole_parts_out_and_predict_them(rows, fit):
    assert len(set(split_parts("group", rows))) == 2
    assert len(set(split_parts("release", rows))) == 2
    with Simulators(rows, 1) as simulators:
        split = leave_out("group", rows, fit, simulators=simulators)
    errors = split.errors("tpot_s")
    assert errors is not None
    assert errors.rows == len(rows)
    assert errors.median < 0.02  # the rows are exact, so half of them tell of the others


def test_repeats_stay_in_one_random_part_and_make_the_noise_floor(rows):
    twice = [*rows, *(replace(m, id=m.id + "b", measured={k: 1.1 * v for k, v in m.measured.items()}) for m in rows)]
    parts = split_parts("random", twice)
    assert parts[: len(rows)] == parts[len(rows) :]
    assert setup(twice[0]) == setup(twice[len(rows)])
    floor = noise_floor(twice)
    assert floor["tpot_s"].rows == len(rows)
    assert floor["tpot_s"].median == pytest.approx(1 - 1 / 1.1, abs=1e-9)
    assert noise_floor([*rows, *rows]) == {}


def test_a_profile_file_reads_back_as_the_fit(fit):
    day = dt.date(2026, 1, 2)
    quantities = fitted_quantities(fit, "vllm", source="serving-measurements", locator="x", day=day)
    text = profile_text(load_engine("vllm"), quantities, command="chipseconds calibrate serving x")
    assert text == profile_text(load_engine("vllm"), quantities, command="chipseconds calibrate serving x")
    profile = parse(EngineSpec, tomllib.loads(text), "text").profile
    assert profile.step_s == pytest.approx(fit.profiles["vllm"].step_s, rel=1e-3)
    assert profile.weights_slowdown == pytest.approx(fit.profiles["vllm"].weights_slowdown, rel=1e-3)


def test_parameters_are_few_and_belong_to_no_row_model_or_chip():
    found = parameters_for(["vllm", "sglang", "tensorrt-llm"])
    assert len(found) <= 26
    assert {p.engine for p in found} == {None, "vllm", "sglang", "tensorrt-llm"}
    assert all(p.low <= p.prior <= p.high for p in found)


def test_validation_lists_rows_that_cannot_run(rows):
    too_large = replace(rows[0], id="large", model="llama-3.1-405b", pools=(Pool(tp=1),))
    found = validate(Data((*rows[:2], too_large), (Unsupported("x", "t", "why"),)), profiles=BASE)
    assert [u.id for u in found.unsupported] == ["x", "large"]
    assert found.coverage == pytest.approx(2 / 4)
    assert found.rows[0].errors["tpot_s"] == pytest.approx(
        predict(rows[0], BASE["vllm"])["tpot_s"] / rows[0].measured["tpot_s"] - 1
    )


def test_error_summary_of_known_errors():
    e = error_summary("tpot_s", [-0.2, 0.1, 0.4])
    assert (e.median, e.bias, e.rows) == (0.2, 0.1, 3)
    assert e.mean == pytest.approx(0.7 / 3)


def test_calibrating_nothing_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no table"):
        calibrate_serving(tmp_path)
    with pytest.raises(InputError, match="group"):
        calibrate_serving(tmp_path, splits=["groups"])


def test_ranking_by_exact_predictions_loses_nothing_and_by_wrong_ones_does(rows):
    exact = np.zeros((len(rows), 4))
    found = ranking(rows, exact)
    assert found is not None
    assert (found.median_loss, found.p90_loss, found.missed) == (0.0, 0.0, 0.0)
    wrong = exact.copy()
    wrong[[m.clients == 2 for m in rows]] = -3.0  # few clients look twenty times as fast
    worse = ranking(rows, wrong)
    assert worse is not None
    assert worse.median_loss > 0.3
