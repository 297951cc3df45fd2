"""Measured runs are simulated as they were taken: names, formats, loads, layouts, and what a client would report."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from simulator.calibration import harness
from simulator.calibration.harness import lengths, predict, replica, requests_of, slice_of
from simulator.calibration.measurements import Measurement, Pool, chip_name, model_name
from simulator.calibration.tables import read_measurements, serving_precision
from simulator.catalog.engines import EngineProfile
from simulator.errors import InputError, UnpriceableError

PLAIN = EngineProfile(max_num_seqs=64, max_num_batched_tokens=1024)


def measurement(**changes):
    values = {
        "id": "a",
        "table": "t",
        "model": "llama-3-8b",
        "chip": "h100-sxm",
        "engine": "vllm",
        "engine_version": "0.19.0",
        "dtype": "bf16",
        "precision": "bf16",
        "pools": (Pool(),),
        "load": "closed",
        "clients": 4,
        "prompt_tokens": 200,
        "output_tokens": 50,
        "range_ratio": 0.8,
        "n_requests": 40,
        "measured": {"ttft_s": 0.05, "tpot_s": 0.008},
    }
    return Measurement(**(values | changes))


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3-8b"),
        ("nvidia/DeepSeek-R1-0528-FP4", "deepseek-v3"),
        ("nvidia/DeepSeek-R1-0528-FP4-v2", "deepseek-v3"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("moonshotai/Kimi-K2.5", "kimi-k2.5"),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", "llama-4-maverick"),
    ],
)
def test_released_names_lead_to_the_architecture(written, name):
    assert model_name(written) == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        *(("gb200_sxm", "gb200"), ("GB300-NVL72", "gb300"), ("b300_sxm", "b300"), ("h20_sxm", "h20")),
        *(("H200", "h200-sxm"), ("h100_pcie", "h100-pcie"), ("h100_nvl", "h100-nvl"), ("a100_sxm", "a100-80-sxm")),
    ],
)
def test_chips_are_known_with_their_board_or_without(written, name):
    assert chip_name(written) == name


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnpriceableError, match="llama-3-70b"):
        model_name("meta-llama/Llama-3-70")
    with pytest.raises(UnpriceableError, match="h100"):
        chip_name("h100_sxmm")


@pytest.mark.parametrize(
    ("row", "model", "chip", "word"),
    [
        ({"precision": "bf16"}, "llama-3-8b", "h100-sxm", "bf16"),
        ({"precision": "fp8"}, "llama-3-70b", "b200", "fp8kv8"),
        ({"precision": "fp8"}, "deepseek-v3", "b200", "fp8kv8g128"),
        ({"precision": "fp8", "gemm_quant": "fp8_block", "subset": "nvidia_internal_gap_analysis"}, "qwen3-235b-a22b", "h100-sxm", "fp8g128"),
        ({"precision": "fp4"}, "gpt-oss-120b", "h100-sxm", "mxfp4-experts"),
        ({"precision": "fp4"}, "gpt-oss-120b", "b200", "wmxfp4afp8-experts"),
        ({"precision": "fp4"}, "llama-3-70b", "b200", "nvfp4kv8"),
        ({"precision": "int4"}, "kimi-k2.5", "b200", "int4g32-experts"),
    ],
)  # fmt: skip
def test_formats_of_a_row_are_those_its_checkpoint_is_released_in(row, model, chip, word):
    assert serving_precision(row, model, chip) == word


def test_lengths_are_uniform_in_the_ratio_and_the_same_each_time():
    drawn = lengths("x", 1000, 0.8, 20_000)
    assert drawn.min() == 800
    assert drawn.max() == 1000
    assert drawn.mean() == pytest.approx(900, abs=2)
    assert np.array_equal(drawn, lengths("x", 1000, 0.8, 20_000))
    assert (lengths("x", 77, 1.0, 10) == 77).all()


def test_a_lone_client_waits_for_exactly_its_own_steps():
    """One client, fixed lengths: TTFT is one prefill step, TPOT the mean decode step at its own contexts."""
    profile = replace(PLAIN, request_s=0.5)
    m = measurement(clients=1, n_requests=3, range_ratio=1.0)
    cost = harness._cost(replica(m, m.pools[0], profile).kernels, profile)
    prefill = cost.step_s(n=200, P=1, A=200 * 201 / 2, K=200, R=1)
    decode = np.mean([cost.step_s(n=1, B=1, S=200 + i, R=1) for i in range(1, 50)])
    found = predict(m, profile)
    assert found["ttft_s"] == pytest.approx(prefill + 0.5, rel=1e-9)
    assert found["tpot_s"] == pytest.approx(decode, rel=1e-9)
    assert found["output_tokens_per_s"] == pytest.approx(50 / (found["ttft_s"] + 49 * decode))


def test_everything_queued_runs_at_the_rate_of_its_own_makespan():
    m = measurement(load="queued", clients=0, n_requests=200, range_ratio=1.0, measured={"output_tokens_per_s": 1.0})
    at_once = predict(m, PLAIN)["output_tokens_per_s"]
    assert at_once > predict(measurement(range_ratio=1.0, n_requests=200), PLAIN)["output_tokens_per_s"]


def test_delays_of_a_first_token_move_ttft_and_nothing_else():
    slow, fast = (predict(measurement(), replace(PLAIN, request_s=s)) for s in (0.1, 0.0))
    assert slow["ttft_s"] - fast["ttft_s"] == pytest.approx(0.1)
    assert slow["tpot_s"] == fast["tpot_s"]


def test_polling_makes_requests_wait_for_half_the_interval():
    seldom = predict(measurement(poll_steps=30, n_requests=400), PLAIN)
    always = predict(measurement(n_requests=400), PLAIN)
    waited = seldom["ttft_s"] - always["ttft_s"]
    assert 10 * always["tpot_s"] < waited < 25 * always["tpot_s"]


def test_held_back_prompts_wait_for_so_many_steps():
    held = predict(measurement(hold_steps=20, n_requests=400), PLAIN)
    always = predict(measurement(n_requests=400), PLAIN)
    assert 12 * always["tpot_s"] < held["ttft_s"] - always["ttft_s"] < 28 * always["tpot_s"]


def test_a_client_waits_for_every_token_of_its_prompt():
    slow, fast = (predict(measurement(range_ratio=1.0), replace(PLAIN, request_token_s=s)) for s in (1e-5, 0.0))
    assert slow["ttft_s"] - fast["ttft_s"] == pytest.approx(1e-5 * 200)
    assert slow["tpot_s"] == fast["tpot_s"]


def test_engines_that_reserve_whole_requests_seat_as_many_as_fit_and_preempt_nobody():
    m = measurement(clients=64, n_requests=640, prompt_tokens=2000, output_tokens=2000)
    small = replace(PLAIN, workspace_bytes=52e9)
    one = replica(m, m.pools[0], small)
    requests = requests_of(m, 1, small)
    reserving = replace(small, reserve_output=True)
    settings = one.settings(reserving, requests)
    whole = np.ceil((requests.prompt_tokens + requests.output_tokens) / 16).mean()
    assert settings.max_num_seqs == int(settings.num_kv_blocks / whole) < 64
    waits, packs = predict(m, reserving), predict(m, small)
    assert waits["ttft_s"] > packs["ttft_s"]
    assert waits["tpot_s"] < packs["tpot_s"]


def test_beams_share_their_prompt_and_count_once():
    one, four = (
        predict(
            measurement(load="queued", clients=0, n_requests=50, beams=b, measured={"output_tokens_per_s": 1.0}), PLAIN
        )
        for b in (1, 4)
    )
    assert one["output_tokens_per_s"] / 4 < four["output_tokens_per_s"] < one["output_tokens_per_s"]


def test_pipeline_stages_share_the_cache_and_the_clients():
    whole, two = Pool(tp=2), Pool(tp=1, pp=2)
    one, piped = (replica(measurement(), p, PLAIN) for p in (whole, two))
    assert (one.equals, piped.equals, piped.micro_batches) == (1, 2, 2)
    requests = requests_of(measurement(), 1, PLAIN)

    def blocks(part):
        return part.settings(PLAIN, requests).num_kv_blocks

    assert blocks(piped) == pytest.approx(blocks(one) / 2, rel=0.05)
    assert requests_of(measurement(clients=8), 2, PLAIN).concurrency == 4


def test_attention_ranks_divide_the_clients_and_share_the_experts():
    m = measurement(model="qwen3-30b-a3b", pools=(Pool(tp=1, dp=4, ep=4),), clients=16, n_requests=160)
    assert replica(m, m.pools[0], PLAIN).equals == 4
    found = predict(m, PLAIN)
    assert 0 < found["tpot_s"] < 1


def test_prefill_and_decode_pools_hand_over():
    """A decode pool of its own spares decodes the prefills of others, and costs the transfer."""
    long = {"prompt_tokens": 4000, "output_tokens": 100, "clients": 8, "n_requests": 80}
    mixed = predict(measurement(**long), PLAIN)
    apart = predict(measurement(pools=(Pool(), Pool()), **long), PLAIN)
    assert apart["tpot_s"] < mixed["tpot_s"]
    assert apart["ttft_s"] > 0
    assert apart["e2e_s"] > apart["ttft_s"]


def test_first_tokens_come_from_the_decode_pool():
    """TensorRT-LLM answers at decode iterations that its interval divides; the prompt's token is the first: 18 steps of 98."""
    long = {"prompt_tokens": 4000, "output_tokens": 100, "range_ratio": 1.0, "clients": 8, "n_requests": 80}
    at_once, held, slow = (
        predict(measurement(pools=(Pool(), Pool()), stream_interval=every, **long), PLAIN) for every in (1, 20, 1000)
    )
    steps_s = at_once["e2e_s"] - at_once["ttft_s"]
    assert at_once["e2e_s"] == held["e2e_s"] == slow["e2e_s"]
    assert held["ttft_s"] - at_once["ttft_s"] == pytest.approx(18 / 98 * steps_s, rel=1e-9)
    assert held["tpot_s"] == pytest.approx((held["e2e_s"] - held["ttft_s"]) / 99, rel=1e-9)
    assert slow["ttft_s"] == pytest.approx(slow["e2e_s"])  # all at once, with the last token


def test_a_client_waits_for_each_prompt_token_in_front_of_two_pools_too():
    both = {"pools": (Pool(), Pool()), "prompt_tokens": 1000, "range_ratio": 1.0}
    waits = PLAIN.with_values(request_token_s=PLAIN.request_token_s + 1e-5)
    found, longer = (predict(measurement(**both), profile) for profile in (PLAIN, waits))
    assert longer["ttft_s"] - found["ttft_s"] == pytest.approx(1e-2, rel=1e-6)
    assert longer["tpot_s"] == found["tpot_s"]


def test_slices_of_published_sizes():
    assert slice_of("h100-sxm", 8).n_nodes == 1
    assert slice_of("h100-sxm", 16).n_nodes == 2
    with pytest.raises(UnpriceableError, match="no slice of 3"):
        slice_of("h100-sxm", 3)


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


ROW = {
    "id": "r1", "engine": "vllm", "engine_version": "0.19.0", "model": "meta-llama/Llama-3.1-8B", "gpu": "h100_sxm", "n_gpus": "1.0",
    "tp": "1.0", "pp": "1.0", "attention_dp": "1.0", "moe_ep": "1.0", "precision": "bf16", "isl": "1024", "osl": "256",
    "concurrency": "8.0", "ttft_ms": "80", "tpot_ms": "8",
}  # fmt: skip


def test_a_table_of_rows_is_read_and_what_cannot_run_is_listed(tmp_path):
    rows = [ROW, {**ROW, "id": "r2", "model": "acme/none-7b"}, {**ROW, "id": "r3", "n_gpus": "2.0"}]
    data = read_measurements(write_rows(tmp_path / "rows.csv", rows))
    assert [m.id for m in data.measurements] == ["r1"]
    assert [u.id for u in data.unsupported] == ["r2", "r3"]
    assert "none-7b" in data.unsupported[0].reason
    assert data.measurements[0].measured["output_tokens_per_s"] == pytest.approx(8 * 256 / (0.08 + 255 * 0.008))


def test_a_client_result_needs_a_description_beside_it(tmp_path):
    result = {
        "num_prompts": 80, "max_concurrency": 8, "request_rate": "inf", "total_input_tokens": 80 * 900,
        "total_output_tokens": 80 * 90, "output_throughput": 900.0, "mean_ttft_ms": 60.0, "mean_tpot_ms": 8.0,
    }  # fmt: skip
    file = tmp_path / "run.json"
    file.write_text(json.dumps(result))
    assert "run.toml" in read_measurements(file).unsupported[0].reason
    (tmp_path / "run.toml").write_text('model = "llama-3-8b"\nslice = "h100-sxm:1"\nrange_ratio = 0.8\n')
    (m,) = read_measurements(file).measurements
    assert (m.load, m.clients, m.prompt_tokens, m.output_tokens) == ("closed", 8, 1000, 100)
    assert m.measured == {"ttft_s": 0.06, "tpot_s": 0.008, "output_tokens_per_s": 900.0}
    result["request_rate"] = 5.0
    file.write_text(json.dumps(result))
    (m,) = read_measurements(file).measurements
    assert (m.load, m.rate_per_s) == ("poisson", 5.0)
    arrivals = requests_of(m, 1, PLAIN).arrival_s
    assert arrivals[-1] / len(arrivals) == pytest.approx(1 / 5, rel=0.4)


def test_a_log_is_replayed_with_its_own_arrivals(tmp_path):
    log = [
        {"idx": i, "input_tokens": 100, "output_tokens": 10, "arrival_s": 0.1 * i, "first_token_s": 0.1 * i + 0.03, "last_token_s": 0.1 * i + 0.12}
        for i in range(20)
    ]  # fmt: skip
    file = write_rows(tmp_path / "log.csv", log)
    (tmp_path / "log.toml").write_text('model = "llama-3-8b"\nslice = "h100-sxm:1"\n')
    (m,) = read_measurements(file).measurements
    assert m.measured["ttft_s"] == pytest.approx(0.03)
    assert m.measured["tpot_s_p90"] == pytest.approx(0.01)
    found = predict(m, PLAIN)
    assert set(m.measured) <= set(found)
    assert np.isfinite(list(found.values())).all()


MLPERF_ROW = {
    "gpu": "l40s", "n_gpus": "8", "framework": "TensorRT 10.2.0, CUDA 12.4", "benchmark": "llama2-70b-99", "scenario": "Server", "tp": "", "pp": "",
    "samples_per_s": "10", "target_qps": "11", "mean_output_tokens": "290", "ttft_mean_ms": "290", "tpot_mean_ms": "140", "min_duration_s": "2400",
    "sample_count": "24576",
}  # fmt: skip


def test_an_mlperf_server_runs_as_long_as_its_log(tmp_path):
    rows = [
        MLPERF_ROW,
        MLPERF_ROW | {"scenario": "Offline"},
        MLPERF_ROW | {"tp": "4"},
        MLPERF_ROW | {"min_duration_s": "3600"},
    ]
    server, queued, given, longer = read_measurements(write_rows(tmp_path / "mlperf.csv", rows)).measurements
    assert (server.n_requests, queued.n_requests, longer.n_requests) == (24_576, 24_576, 36_000)
    arrivals = requests_of(longer, 2, PLAIN).arrival_s  # of one engine of two
    assert arrivals[-1] == pytest.approx(3600, rel=0.03)
    # where PCIe is all that links the chips they are stages, unless the log says otherwise
    assert [(m.pools[0].workers, m.pools[0].tp, m.pools[0].pp) for m in (server, given)] == [(2, 1, 4), (2, 4, 1)]


def test_files_that_are_no_table_are_refused(tmp_path):
    write_rows(tmp_path / "other.csv", [{"a": 1}])
    with pytest.raises(InputError, match="not a known table"):
        read_measurements(tmp_path / "other.csv")
    with pytest.raises(InputError, match="no table of serving measurements"):
        read_measurements(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_measurements(tmp_path / "absent")


def test_shared_rows_are_covered(shared):
    data = read_measurements(shared / "data" / "serving")
    serving = [m for m in data.measurements if m.table.startswith("inferencex")]
    lost = [u for u in data.unsupported if u.table.startswith("inferencex")]
    assert len(serving) / (len(serving) + len(lost)) >= 0.95
    assert {m.load for m in data.measurements} == {"closed", "queued", "poisson", "replay"}
