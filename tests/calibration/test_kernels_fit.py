"""Kernel calibration: parameters are found again, files are reproducible, wrong tables are refused."""

import csv
import doctest
import json
from pathlib import Path

import numpy as np
import pytest

from simulator.calibration import kernels_models, regression
from simulator.calibration.kernels import FOLDS, GOALS, calibrate_chip, fit_problem, toml_lines
from simulator.calibration.kernels_models import problems
from simulator.calibration.kernels_tables import chip_folders, read_table, read_tables
from simulator.calibration.regression import Parameter, fit_log_ratios
from simulator.catalog.chips import load_chip
from simulator.catalog.kernel_curves import (
    SCHEDULES,
    CollectiveCurve,
    DecodeCurve,
    GemmCurve,
    PrefillCurve,
    load_curves,
    read_calibration,
)
from simulator.errors import InputError
from simulator.roofline import attention_times, kernel_times
from simulator.roofline.kernel_times import gemm_compute_s, memory_s, soft_max

CHIP = load_chip("h100-sxm")
TRUE = GemmCurve(
    peak=0.8, hbm=0.75, launch_s=3e-6, fill_bytes=5e5, depth=120.0, tile=1500.0, split_s=4e-6, sharpness=4.0
)


def write(file: Path, columns: tuple[str, ...], rows: list[tuple]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([columns, *rows])
    return file


def gemm_s(m: float, n: float, k: float, curve: GemmCurve = TRUE) -> float:
    peak, hbm = CHIP.peak_flops_per_s("bf16"), CHIP.hbm_bandwidth_bytes_per_s
    compute = gemm_compute_s(
        m, n, k, curve, peak_flops_per_s=peak, hbm_bytes_per_s=hbm, multiprocessors=CHIP.multiprocessor_count
    )
    memory = memory_s(2 * (n * k + m * k + m * n), curve.fill_bytes, curve.hbm, hbm)
    return curve.launch_s + float(soft_max(compute, memory, curve.sharpness))


@pytest.fixture
def gemm_table(tmp_path):
    """Times of a machine that obeys the model, within 2 %, one row in 40 far off."""
    noise = np.random.default_rng(7)
    rows = []
    for n in (256, 768, 1024, 2048, 4096, 5120, 8192, 14336, 28672):
        for k in (512, 1024, 3072, 4096, 8192, 16384):
            for m in (1, 8, 64, 128, 200, 512, 777, 1024, 2048, 4096, 8192):
                off = 2.0 if noise.random() < 0.025 else 1 + 0.02 * noise.standard_normal()
                rows.append(("bfloat16", m, n, k, f"{1e6 * gemm_s(m, n, k) * off:.5g}"))
    return write(tmp_path / "gemm_mine.csv", ("dtype", "m", "n", "k", "latency_us"), rows)


def test_known_parameters_are_found_again_within_their_errors(gemm_table):
    (problem,) = problems(CHIP, [read_table(gemm_table)])
    fit = fit_problem(problem)
    assert fit.framework == "mine"
    assert fit.parameters["sharpness"] == 4
    for name in ("peak", "hbm", "launch_s", "depth", "tile", "split_s"):
        found, error = fit.parameters[name], fit.standard_errors[name]
        assert 0 < error < 0.2, name
        assert abs(np.log(found / getattr(TRUE, name))) < max(5 * error, 0.01), name
    assert fit.residuals[0].median_abs < 0.02  # the noise, in spite of the rows that are off by a factor of two
    assert fit.residuals[0].p90_abs < 0.05
    correlation = np.array(fit.correlation)
    assert correlation.shape[0] == sum(e > 0 for e in fit.standard_errors.values())
    assert np.allclose(np.diag(correlation), 1, atol=0.01)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_how_a_kernel_deals_keys_is_found_again_with_its_parameters(tmp_path, schedule):
    """Times of a machine that obeys the model, within 1 %: the schedule is told from the others, and from none."""
    of_blocks = (
        {"item_s": 2e-6, "walk_s": 1.3e-8, "pair": 1.6, "sharpness": 4.0, "schedule": schedule} if schedule else {}
    )
    true = DecodeCurve(hbm=0.8, peak=0.3, launch_s=8e-6, ramp_s=4e-6, ramp_bytes=2e7, **of_blocks)
    peak, hbm, units = CHIP.peak_flops_per_s("bf16"), CHIP.hbm_bandwidth_bytes_per_s, CHIP.multiprocessor_count
    noise, rows = np.random.default_rng(3), []
    for heads, kv_heads in ((32, 8), (16, 4), (8, 1), (8, 8), (64, 8), (4, 2)):
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            for keys in (16, 64, 256, 1024, 4096, 16384):
                read = 2 * batch * keys * kv_heads * 128 * 2
                padded = attention_times.padded_heads(heads, kv_heads)
                work = max(read / (hbm * true.hbm), 4 * batch * keys * padded * 128 / (peak * true.peak))
                blocks = np.array([batch * float(attention_times.decode_blocks(heads, kv_heads, latent=False))])
                dealt = attention_times.deal(schedule, blocks, np.array([float(keys)]), units)
                key_s = attention_times.block_key_s(128, true)
                if schedule:
                    work = float(soft_max(attention_times.busiest_s(dealt, key_s, true)[0], work, true.sharpness))
                time = true.launch_s + work + true.ramp_s * min(1, read / true.ramp_bytes)
                row = ("bfloat16", "bfloat16", batch, keys, heads, kv_heads, 128)
                rows.append((*row, f"{1e6 * time * (1 + 0.01 * noise.standard_normal()):.5g}"))
    columns = ("dtype", "kv_dtype", "batch", "kv_len", "heads", "kv_heads", "head_dim", "latency_us")
    (problem,) = problems(CHIP, [read_table(write(tmp_path / "attention_decode_mine.csv", columns, rows))])
    fit = fit_problem(problem)
    assert fit.schedule == schedule
    assert fit.residuals[0].median_abs < 0.02
    for name in ("hbm", "item_s", "walk_s", "pair"):
        assert fit.parameters[name] == pytest.approx(getattr(true, name), rel=0.1), name
    (few,) = problems(CHIP, [read_table(write(tmp_path / "attention_decode_mine.csv", columns, rows[::8]))])
    assert fit_problem(few).schedule == ""  # too few rows to tell


def test_heads_that_share_no_keys_are_another_kernel_of_tensorrt_llm_alone(tmp_path):
    columns = ("dtype", "kv_dtype", "batch", "kv_len", "heads", "kv_heads", "head_dim", "latency_us")
    rows = [
        ("bfloat16", "bfloat16", batch, keys, heads, kv_heads, 128, 10 + batch * keys * kv_heads / 1e4)
        for heads, kv_heads in ((32, 8), (16, 4), (8, 8), (4, 4))
        for batch in range(1, 9)
        for keys in range(100, 900, 100)
    ]
    found = {}
    for framework in ("trtllm", "vllm"):
        table = read_table(write(tmp_path / f"attention_decode_{framework}.csv", columns, rows))
        found[framework] = {p.op: len(p.measured) for p in problems(CHIP, [table])}
    assert found == {"trtllm": {"attention_decode": 128, "mha_decode": 128}, "vllm": {"attention_decode": 256}}


def test_selections_of_other_chips_are_work_in_sglangs_tables_alone(tmp_path):
    # 256 experts over 8 chips, 8 selections a token: a chip's own are an eighth of the work that was measured.
    columns = (
        "dtype",
        "hidden",
        "inter",
        "gated",
        "topk",
        "experts",
        "tp",
        "ep",
        "distribution",
        "tokens",
        "latency_us",
    )
    rows = [("bfloat16", 4096, 2048, 1, 8, 256, 1, ep, "balanced", n, 1e7) for ep in (1, 8, 64) for n in (1, 16384)]
    values = {
        "peak": 0.5,
        "hbm": 0.8,
        "launch_s": 1e-5,
        "fill_bytes": 0.0,
        "depth": 0.0,
        "tile": 0.0,
        "traffic": 1.0,
        "sharpness": 4.0,
    }
    times = {}
    for framework in ("sglang", "vllm"):
        (problem,) = problems(CHIP, [read_table(write(tmp_path / f"moe_{framework}.csv", columns, rows))])
        times[framework] = problem.model(values, np.arange(len(rows)))[1::2]
    one, eight, all_64 = times["sglang"] / times["sglang"][0]
    assert eight == pytest.approx(1, rel=0.05)
    assert all_64 == pytest.approx(1 / 8, rel=0.05)
    assert times["vllm"][1] / times["vllm"][0] == pytest.approx(1 / 8, rel=0.05)
    assert one == 1


def test_the_same_rows_give_the_same_file_byte_for_byte_and_the_catalogue_reads_it(gemm_table, tmp_path):
    def lines():
        done = calibrate_chip("h100-sxm", gemm_table.parent, command="c", source=("lab",))
        return "\n".join(toml_lines(done.file)) + "\n"

    text = lines()
    assert text == lines()
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    assert read_calibration(str(file)).chip == "h100-sxm"
    curve = load_curves(str(file)).get(GemmCurve, "gemm", "bfloat16")
    assert curve is not None
    assert curve.peak == pytest.approx(TRUE.peak, rel=0.02)


def test_left_out_shapes_are_whole_and_all_are_left_out_once(gemm_table):
    (problem,) = problems(CHIP, [read_table(gemm_table)])
    from simulator.calibration.kernels import _folds

    fold = _folds(problem.shape)
    assert set(fold) == set(range(FOLDS))
    for shape in set(problem.shape):
        assert len(set(fold[problem.shape == shape])) == 1


def test_a_model_that_cannot_transfer_is_worse_on_shapes_left_out(tmp_path):
    """Times that depend on nothing but the shape's name: in sample a constant is no worse than out of it; noise shows."""
    noise = np.random.default_rng(1)
    rows = [
        ("all_reduce", "nccl_2", "half", n, size, f"{(10 + size / 1e4) * np.exp(0.2 * noise.standard_normal()):.5g}")
        for n in (2, 8)
        for size in 2 ** np.arange(9, 29)
    ]
    table = read_table(
        write(tmp_path / "comm.csv", ("collective", "impl", "dtype", "num_gpus", "bytes", "latency_us"), rows)
    )
    for problem in problems(CHIP, [table]):
        fit = fit_problem(problem)
        assert fit.op == "all_reduce"
        assert fit.residuals[0].median_abs > 0.03
        assert fit.residuals[0].median_abs >= 0.9 * fit.in_sample_median_abs


def test_a_parameter_at_its_limit_is_named_and_has_no_error():
    x = np.linspace(1, 9, 20)
    fit = fit_log_ratios(lambda p: p[0] * x, 5 * x, [Parameter("slope", 1, 0.1, 2)])
    assert fit.values[0] == pytest.approx(2)
    assert fit.at_limit[0]
    assert fit.relative_errors[0] == 0


def test_an_outlier_moves_a_robust_fit_by_less_than_its_share():
    x = np.linspace(1, 9, 50)
    measured = 3 * x
    measured[7] *= 100
    fit = fit_log_ratios(lambda p: p[0] * x, measured, [Parameter("slope", 1, 0.1, 100)])
    assert fit.values[0] == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize(
    ("name", "columns", "row", "message"),
    [
        ("gemm_x.csv", ("dtype", "m", "n", "latency_us"), ("bfloat16", 1, 1, 1), "no column 'k'"),
        ("gemm_x.csv", ("dtype", "m", "n", "k", "latency_us"), ("bfloat16", "many", 1, 1, 1), "row 2: m = 'many'"),
        ("gemm_x.csv", ("dtype", "m", "n", "k", "latency_us"), ("bfloat16", 1, 1, 1, -3), "row 2: latency_us = -3"),
        ("times.csv", ("a",), (1,), "must start with one of"),
        ("gemm_x.csv", ("dtype", "m", "n", "k", "latency_us"), ("fp4_thing", 1, 1, 1, 3), "no row is in a format"),
    ],
)
def test_wrong_tables_are_refused_with_file_row_and_column(tmp_path, name, columns, row, message):
    file = write(tmp_path / name, columns, [row])
    with pytest.raises(InputError, match=message):
        calibrate_chip("h100-sxm", file, command="c", source=("x",))


def test_too_few_rows_are_refused(tmp_path):
    rows = [("bfloat16", m, 4096, 4096, 50) for m in (1, 2, 4)]
    file = write(tmp_path / "gemm_x.csv", ("dtype", "m", "n", "k", "latency_us"), rows)
    with pytest.raises(InputError, match="3 rows cannot fix"):
        calibrate_chip("h100-sxm", file, command="c", source=("x",))


def test_folders_are_chips_by_name_or_by_word(tmp_path):
    for name in ("h100_sxm", "b200", "elsewhere"):
        (tmp_path / name).mkdir()
    assert sorted(chip_folders(tmp_path, None)) == ["b200", "h100-sxm"]
    assert chip_folders(tmp_path / "elsewhere", "l4") == {"l4": tmp_path / "elsewhere"}
    with pytest.raises(InputError, match="--chip"):
        chip_folders(tmp_path / "elsewhere", None)
    with pytest.raises(InputError, match="does not exist"):
        chip_folders(tmp_path / "nowhere", None)
    with pytest.raises(InputError, match="no table to fit"):
        read_tables(tmp_path / "b200")


@pytest.mark.parametrize("module", [regression, kernels_models, kernel_times, attention_times])
def test_examples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


MEASURED = {"a100-80-sxm": "a100_sxm", "b200": "b200_sxm", "h100-sxm": "h100_sxm", "l40s": "l40s", "rtx-pro-6000": "rtx_pro_6000_server"}  # fmt: skip


@pytest.mark.parametrize("chip", sorted(MEASURED))
def test_committed_collectives_are_what_the_tables_give(shared, chip):
    """The cheapest part of each committed file, fitted again: every character must agree."""
    folder = shared / "data/kernels" / MEASURED[chip]
    fits = [fit_problem(p) for p in problems(load_chip(chip), [read_table(folder / "comm.csv.gz")])]
    committed = read_calibration(chip)
    again = committed.model_copy(
        update={"fits": tuple(sorted(fits, key=lambda f: (f.op, f.dtype, f.kv_dtype, f.framework, f.chips)))}
    )
    kept = committed.model_copy(update={"fits": tuple(f for f in committed.fits if f.op in {p.op for p in fits})})
    assert list(toml_lines(again)) == list(toml_lines(kept))
    assert committed.tables["comm"] == read_table(folder / "comm.csv.gz").digest


@pytest.mark.parametrize("chip", sorted(MEASURED))
def test_committed_files_say_how_far_off_they_are(chip):
    calibration = read_calibration(chip)
    assert calibration.command.startswith("chipseconds calibrate kernels")
    for fit in calibration.fits:
        every, *parts = fit.residuals
        assert every.regime == "all"
        assert every.rows == fit.rows == sum(part.rows for part in parts)
        assert set(fit.standard_errors) == set(fit.parameters)


#: (chip, op) whose medians over all rows on left-out shapes are above their goal in the committed files: none.
ABOVE_GOAL: set[tuple[str, str]] = set()


def test_schedules_are_those_of_the_libraries_sources():
    """Each library's published rule is the one that its times tell, on every chip and in every width where it was measured."""
    found: dict[tuple[str, str, str, str], set[str]] = {}
    for chip in MEASURED:
        for fit in read_calibration(chip).fits:
            if fit.op in {"attention_decode", "mla_decode"}:
                found.setdefault((chip, fit.framework, fit.op, fit.kv_dtype), set()).add(fit.schedule)
    assert found["a100-80-sxm", "sglang", "attention_decode", "bfloat16"] == {"shares"}  # FlashAttention-3
    for chip in ("h100-sxm", "l40s", "rtx-pro-6000"):
        assert found[chip, "trtllm", "attention_decode", "bfloat16"] == {"waves"}
    assert found["h100-sxm", "trtllm", "attention_decode", "fp8"] == {"waves"}
    for chip in ("l40s", "rtx-pro-6000"):
        assert found[chip, "trtllm", "attention_decode", "fp8"] == {"whole"}
    for chip in ("a100-80-sxm", "rtx-pro-6000"):
        assert (
            found[chip, "trtllm", "mla_decode", "bfloat16"] == found[chip, "trtllm", "mla_decode", "fp8"] == {"whole"}
        )


@pytest.mark.parametrize("chip", sorted(MEASURED))
def test_medians_on_left_out_shapes_meet_their_goals_or_are_listed(chip):
    from simulator.calibration.kernels import ChipCalibration

    medians = ChipCalibration(read_calibration(chip)).median_by_op()
    above = {(chip, op) for op, median in medians.items() if median > GOALS[op]}
    assert above == {pair for pair in ABOVE_GOAL if pair[0] == chip}


def test_attention_has_a_curve_for_each_width_of_heads_and_the_nearest_stands_for_others():
    curves = load_curves("h100-sxm")
    prefill = {
        w: curves.at_width(PrefillCurve, "attention_prefill", "bfloat16", "bfloat16", w) for w in (64, 72, 96, 128, 512)
    }
    assert prefill[64] != prefill[128]
    assert prefill[72] == prefill[64]
    assert prefill[96] == prefill[128]  # in proportion, 96 is nearer to 128 than to 64
    assert prefill[512] == curves.at_width(PrefillCurve, "attention_prefill", "bfloat16", "bfloat16", 256)


def test_a_table_of_a_models_attention_is_one_of_decode_and_one_of_prefill(tmp_path):
    """Llama-3-8B: 32 query heads of 128 and 8 KV heads; decoding reads the cache and the new token, a chunk its history."""
    file = tmp_path / "attention_tpu.csv"
    file.write_text(
        "model,phase,batch,chunk,kv_cache,latency_us\nmeta-llama/Llama-3.1-8B,decode,4,0,32,6.3\nmeta-llama/Llama-3.1-8B,prefill,1,64,96,20\n"
    )
    decode, prefill = read_tables(tmp_path)
    assert (decode.kind, prefill.kind) == ("attention_decode", "attention_prefill")
    assert (decode.columns["kv_len"][0], decode.columns["heads"][0], decode.columns["kv_heads"][0]) == (33, 32, 8)
    assert (prefill.columns["seq"][0], prefill.columns["history"][0], prefill.columns["head_dim"][0]) == (64, 96, 128)


def test_curves_of_collectives_are_interpolated_between_measured_numbers_of_chips():
    from simulator.roofline.calibrated import collective_curve

    curves = load_curves("h100-sxm")
    two, four, eight, many = (collective_curve(curves, "all_reduce", n) for n in (2, 4, 8, 72))
    assert isinstance(two, CollectiveCurve)
    assert two.latency_s < four.latency_s < eight.latency_s
    assert many == eight
    assert collective_curve(curves, "all_reduce", 1) is None


def test_the_command_prints_one_document_and_writes_only_when_asked(run_cli, gemm_table, tmp_path):
    document = json.loads(run_cli("calibrate", "kernels", str(gemm_table), "--chip", "h100-sxm", "--json").stdout)
    (chip,) = document["chips"]
    (fit,) = chip["fits"]
    assert fit["parameters"]["peak"] == pytest.approx(TRUE.peak, rel=0.02)
    assert document["goals_median_abs"]["gemm"] == 0.08
    out = tmp_path / "out"
    done = run_cli("calibrate", "kernels", str(gemm_table), "--chip", "h100-sxm", "--regimes", "--out", str(out))
    assert "gemm bfloat16" in done.stdout
    assert "m <= 64" in done.stdout
    assert [file.name for file in out.iterdir()] == ["h100-sxm.toml"]
    assert run_cli("calibrate", "kernels", str(tmp_path / "none"), code=2).stderr.startswith("chipseconds:")
