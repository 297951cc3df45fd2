"""``calibrate device``: kernels compute what they should, measurements are sound, and the chip they make is one."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from simulator.calibration.device_chip import Target, calibrate_device, save
from simulator.calibration.device_measure import measure
from simulator.calibration.device_numpy import Device, NumpyBackend
from simulator.calibration.device_tables import (
    COLUMNS,
    MEMORY_KERNELS,
    Key,
    Measurement,
    Timing,
    read_measurement,
    write_tables,
)
from simulator.calibration.device_torch import TorchBackend
from simulator.calibration.kernels import calibrate_chip
from simulator.catalog.chips import load_chip
from simulator.catalog.kernel_curves import CollectiveCurve, DecodeCurve, GemmCurve, PrefillCurve, VectorCurve
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.cli.calibrate import calibrate
from simulator.errors import InputError
from simulator.roofline.analysis import step_report
from simulator.roofline.compile import compile_step_cost, step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.kernel_times import gemm_compute_s, memory_s, soft_max
from simulator.roofline.ops import StepShape
from simulator.roofline.precision import parse_precision

H100 = load_chip("h100-sxm")
CURVES = H100.efficiency.curves


def torch_backend():
    pytest.importorskip("torch", reason="PyTorch is an optional extra")
    return TorchBackend("cpu", "float32")


@pytest.fixture(params=["numpy", "torch"])
def backend(request):
    return NumpyBackend() if request.param == "numpy" else torch_backend()


def own(backend, array):
    return array.astype(np.float32) if backend.framework == "numpy" else backend.torch.as_tensor(array).float()


def softmax_attention(q, k, v, *, causal: bool):
    """Plain attention in float64, [B, heads, S, d] over [B, kv_heads, L, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a, group, axis=1) for a in (k, v))
    scores = np.einsum("bhsd,bhtd->bhst", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], dtype=bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("length", [1, 5, 128, 300])
def test_attention_is_attention(backend, length):
    draw = np.random.default_rng(length)
    q = draw.standard_normal((2, 8, length, 16))
    k, v = draw.standard_normal((2, 2, 2, length, 16))
    expected = softmax_attention(q, k, v, causal=True)
    out = backend.empty(2, 8, length, 16)
    found = backend.prefill_attention(*(own(backend, a) for a in (q, k, v)), out)
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5)
    last = backend.decode_attention(*(own(backend, a) for a in (q[:, :, -1], k, v)), backend.empty(2, 8, 16))
    np.testing.assert_allclose(np.asarray(last), expected[:, :, -1], atol=2e-5)


def test_norm_gate_and_product_are_what_they_say(backend):
    draw = np.random.default_rng(3)
    x, residual, both = draw.standard_normal((5, 8)), draw.standard_normal((5, 8)), draw.standard_normal((5, 12))
    weight, matrix = draw.standard_normal(8), draw.standard_normal((7, 8))
    held = own(backend, residual)
    normed = backend.add_norm(own(backend, x), held, own(backend, weight), backend.empty(5, 8))
    total = x + residual
    np.testing.assert_allclose(np.asarray(held), total, atol=1e-6)
    expected = total / np.sqrt((total**2).mean(1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(np.asarray(normed), expected, atol=1e-5)
    a, b = both[:, :6], both[:, 6:]
    gated = backend.gate(own(backend, both), backend.empty(5, 6))
    np.testing.assert_allclose(np.asarray(gated), a / (1 + np.exp(-a)) * b, atol=1e-6)
    product = backend.product(own(backend, x), own(backend, matrix), backend.empty(5, 7))
    np.testing.assert_allclose(np.asarray(product), x @ matrix.T, atol=1e-5)


@pytest.fixture(scope="module")
def tiny():
    """The tiny mode on this machine."""
    said = []
    return measure(NumpyBackend(), 2.0, progress=said.append), said


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    target = Target(tmp_path_factory.mktemp("machine") / "here" / "my-machine.toml")
    target.check(overwrite=False)
    done = calibrate_device(tiny[0], target.name, chip=None, command="test")
    return done, target, save(done, tiny[0], target)


def test_the_tiny_mode_measures_every_table(tiny):
    measured, said = tiny
    for table in set(COLUMNS) - {"comm"}:
        assert len(measured.of(table)) >= 6, table
    assert sum(m == 1 for m, _, _ in measured.of("gemm")) >= 4
    assert {kernel for kernel, _, _ in measured.of("memory")} == set(MEMORY_KERNELS)
    for key, t in measured.timings.items():
        assert 0 < t.fastest_s <= t.median_s < 60, key
        assert np.isfinite(t.spread)
        assert t.spread >= 0
        assert t.samples >= 4
    assert measured.peak_flops_per_s > 1e8
    assert measured.bandwidth_bytes_per_s > 1e8
    assert measured.link_bytes_per_s is None
    assert any("products" in line for line in said)


def test_time_grows_with_size(tiny):
    """The quarter of a table's shapes with most work takes longer than the quarter with least, in the median.

    By the fastest of each shape's samples, and of quarters only: a neighbour on the machine takes some of any one
    measurement. That prices grow from shape to shape is a property of the fitted curves, tested on them below.
    """
    measured, _ = tiny
    for table in ("gemm", "attention_prefill", "attention_decode"):
        rows = sorted(measured.of(table).items(), key=lambda row: np.prod(row[0]))
        times = np.array([t.fastest_s for _, t in rows])
        quarter = len(times) // 4
        assert np.median(times[-quarter:]) > np.median(times[:quarter]), table


def test_tables_read_back_as_they_were_written(tiny, tmp_path):
    measured, _ = tiny
    names = [file.name for file in write_tables(measured, tmp_path)]
    assert sorted(names) == sorted(file.name for file in tmp_path.iterdir())
    again = read_measurement(tmp_path)
    assert replace(again, timings={}) == replace(measured, timings={})
    assert set(again.timings) == set(measured.timings)
    for key, t in again.timings.items():
        assert t.median_s == pytest.approx(measured.timings[key].median_s, rel=1e-4)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    list(write_tables(again, tmp_path))
    assert first == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_the_chip_file_is_a_chip_the_whole_tool_takes(saved):
    done, target, files = saved
    assert all(file.is_file() for file in files)
    chip = load_chip(str(target.file))
    assert chip.family == "cpu"
    assert chip.compute.keys() == {"fp32"}
    assert {q.kind for path, q in chip.quantities().items() if not path.startswith("efficiency")} == {"measured"}
    assert {q.kind for path, q in chip.quantities().items() if path.split(".")[-1] in done.constants} == {"measured"}
    curves = chip.efficiency.curves
    for kind, op in ((GemmCurve, "gemm"), (VectorCurve, "gemv")):
        assert curves.get(kind, op, "float32") is not None
    for kind, op in ((PrefillCurve, "attention_prefill"), (DecodeCurve, "attention_decode")):
        assert curves.get(kind, op, "float32", "float32") is not None


def test_its_prices_are_finite_and_grow(saved):
    _, target, _ = saved
    d = Deployment(load_model("qwen2.5-0.5b"), resolve_slice(f"{target.file}:1"), parse_precision("fp32"))
    prefills = [step_report(d, prefill=n, decode=None, context=None).time_s for n in (16, 128, 1024, 8192)]
    decodes = [step_report(d, prefill=None, decode=b, context=c).time_s for b, c in ((1, 64), (1, 4096), (16, 4096))]
    for times in (prefills, decodes):
        assert np.isfinite(times).all()
        assert (np.diff(times) > 0).all()
    cost = compile_step_cost(d)
    for step in (StepShape.decode(1, 50), StepShape.decode(2, 50), StepShape.decode(17, 900), StepShape.prefill(1, 9)):
        sizes = {name: int(value) for name, value in vars(step).items()}
        assert cost.step_s(**sizes) == pytest.approx(step_time_s(d, step), rel=1e-12)


def test_its_tables_give_its_files_again_byte_for_byte(saved):
    done, target, _ = saved
    again = calibrate_device(read_measurement(target.tables), target.name, chip=None, command="test")
    assert again.files == done.files
    assert {name: (target.file.parent / name).read_text() for name in done.files} == done.files


def test_calibrate_kernels_on_its_tables_gives_its_curves(saved):
    done, target, _ = saved
    again = calibrate_chip(str(target.file), target.tables, command="test", source=("x",))
    assert again.file.fits == done.fit.file.fits


class Simulated:
    """A back-end whose kernels take the times that curves of the catalogue give them; arrays are names for shapes."""

    framework, dtype, chip_dtype, element_bytes, mode = "torch", "bfloat16", "bf16", 2, "graph"

    def __init__(self, **changes):
        device = Device("NVIDIA H100 80GB HBM3", "nvidia", 1, 81559 * 2.0**20, 50e6, 132, ("torch 9",))
        self.device = replace(device, **changes)
        self.peak, self.hbm = H100.peak_flops_per_s("bf16"), H100.hbm_bandwidth_bytes_per_s

    def random(self, elements):
        return np.broadcast_to(np.float16(0), (elements,))

    def empty(self, *shape):
        return np.broadcast_to(np.float16(0), shape)

    def sampler(self, call, *_):
        return lambda: float(call(0))

    def product(self, x, weights, _):
        c, (m, k), n = CURVES.get(GemmCurve, "gemm", "bfloat16"), x.shape, weights.shape[0]
        rates = {"peak_flops_per_s": self.peak, "hbm_bytes_per_s": self.hbm, "multiprocessors": 132}
        compute = gemm_compute_s(float(m), n, k, c, **rates)
        return c.launch_s + soft_max(
            compute, memory_s(2 * (n * k + m * k + m * n), c.fill_bytes, c.hbm, self.hbm), c.sharpness
        )

    def copy(self, x, _):
        return 2e-6 + 4 * x.size / (0.9 * self.hbm)

    def add_norm(self, x, *_):
        return 2e-6 + 8 * x.size / (0.7 * self.hbm)

    def gate(self, both, _):
        return 2e-6 + 3 * both.size / (0.7 * self.hbm)

    def prefill_attention(self, q, k, *_):
        (b, h, s, d), kv = q.shape, k.shape[1]
        pairs = b * s * (s + 1) / 2
        return 5e-6 + pairs * 4 * h * d / (0.6 * self.peak) + 2 * 4 * b * s * (h + kv) * d / self.hbm

    def decode_attention(self, _, k, *__):
        return 6e-6 + 4 * k.size / (0.8 * self.hbm)

    def all_reduce(self, elements, _):
        return lambda: 1e-5 + 2 * elements * 1.75 / 3e11


@pytest.fixture(scope="module")
def simulated():
    return measure(Simulated(), 2.0)


def test_a_device_the_catalogue_knows_keeps_its_datasheet_and_gets_its_own_efficiencies(simulated):
    done = calibrate_device(simulated, "lab-h100", chip=None, command="test")
    assert done.known_as == "h100-sxm"
    assert done.chip.compute == H100.compute
    assert done.chip.prices == H100.prices
    assert done.chip.scale_up == H100.scale_up
    assert done.chip.name == "lab-h100"
    assert done.constants["hbm"] == pytest.approx(0.7, rel=0.05)
    assert done.constants["op_overhead"] == pytest.approx(2e-6, rel=0.1)
    assert done.chip.efficiency.collective_latency_s == H100.efficiency.collective_latency_s
    by_op = {fit.op: fit for fit in done.fit.file.fits}
    assert by_op["gemm"].residuals[0].median_abs < 0.02
    assert by_op["gemm"].parameters["peak"] == pytest.approx(CURVES.get(GemmCurve, "gemm", "bfloat16").peak, rel=0.05)
    assert by_op["attention_decode"].parameters["hbm"] == pytest.approx(0.8, rel=0.05)
    assert by_op["attention_prefill"].residuals[0].median_abs < 0.05
    curves = done.chip.efficiency.curves
    assert curves.get(GemmCurve, "gemm", "fp8") == CURVES.get(GemmCurve, "gemm", "fp8")  # not measured: the catalogue's
    assert curves.get(GemmCurve, "gemm", "bfloat16") == GemmCurve(**by_op["gemm"].parameters)
    assert any("keeps" in note for note in done.notes)
    assert "gemv" not in by_op  # matrix units: one row is a product like the others


def test_an_unknown_device_has_the_peaks_that_were_seen(simulated):
    done = calibrate_device(simulated, "mystery", chip="", command="test")
    assert done.known_as is None
    assert done.chip.peak_flops_per_s("bf16") == pytest.approx(simulated.peak_flops_per_s, rel=1e-3)
    assert done.chip.peak_flops_per_s("bf16") < H100.peak_flops_per_s("bf16")
    assert done.chip.hbm_bandwidth_bytes_per_s <= H100.hbm_bandwidth_bytes_per_s
    assert done.chip.family == "nvidia"
    assert "bf16" in done.chip.compute


def test_a_part_of_a_known_device_is_not_that_device(simulated):
    part = replace(simulated, device=replace(simulated.device, memory_bytes=10e9))
    done = calibrate_device(part, "part", chip=None, command="test")
    assert done.known_as is None
    assert any("a part of it" in note for note in done.notes)
    with pytest.raises(InputError, match=r"--chip h100-sxm: .* not the same, or a part of it"):
        calibrate_device(part, "part", chip="h100-sxm", command="test")


def test_all_reduce_of_several_devices_becomes_a_link_and_a_curve():
    measured = measure(Simulated(count=8), 2.0)
    assert len(measured.of("comm")) >= 8
    assert measured.link_bytes_per_s == pytest.approx(3e11, rel=0.02)
    unknown = calibrate_device(measured, "eight", chip="", command="test").chip
    assert unknown.scale_up is not None
    assert unknown.scale_up.sizes == (1, 8)
    curve = unknown.efficiency.curves.get(CollectiveCurve, "all_reduce", chips=8)
    assert curve is not None
    assert curve.latency_s == pytest.approx(1e-5, rel=0.2)
    known = calibrate_device(measured, "eight", chip=None, command="test").chip
    assert known.efficiency.curves.get(CollectiveCurve, "all_reduce", chips=8).link == pytest.approx(3 / 4.5, rel=0.1)


def test_a_fast_device_with_little_memory_gets_no_shape_that_does_not_fit():
    measured = measure(Simulated(kind="cpu", memory_bytes=2e9, cache_bytes=1e6), 20.0)
    held = 0.1 * 2e9 / 2
    sizes = [max(m * k, n * k, m * n) for m, n, k in measured.of("gemm")]
    assert held / 4 < max(sizes) <= held
    assert max(2 * b * s * kv * d for b, s, _, kv, d in measured.of("attention_decode")) <= held


def test_a_busy_machine_is_said_to_be_busy(simulated):
    shaken = {key: replace(t, spread=0.4) for key, t in simulated.timings.items()}
    notes = calibrate_device(replace(simulated, timings=shaken), "busy", chip=None, command="test").notes
    assert any("busy" in note for note in notes)
    assert not any("busy" in note for note in calibrate_device(simulated, "idle", chip=None, command="test").notes)


def test_one_row_is_priced_by_its_own_curve_and_no_faster_than_the_memory(saved):
    _, target, _ = saved
    d = Deployment(load_model("qwen2.5-0.5b"), resolve_slice(f"{target.file}:1"), parse_precision("fp32"))
    chip = d.slice.chip
    curve = chip.efficiency.curves.get(VectorCurve, "gemv", "float32")
    (head,) = (row.op for row in step_report(d, prefill=None, decode=1, context=64).ops if row.op.name == "output head")
    moved = head.weight_bytes + head.activation_bytes
    lost = d.architecture.vocab_size * curve.depth * 4
    expected = curve.launch_s + (moved + lost) / (curve.hbm * chip.hbm_bandwidth_bytes_per_s)
    assert head.time_s == pytest.approx(max(expected, head.flops / chip.peak_flops_per_s("fp32")), rel=1e-9)
    assert head.time_s >= moved / chip.hbm_bandwidth_bytes_per_s


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "soon"], "write seconds or minutes"),
        (["--budget", "1s"], "must be 2 to 600 s"),
        (["--budget", "1h"], "write seconds or minutes"),
        (["--backend", "numpy", "--device", "cuda"], "numpy has cpu alone"),
        (["--backend", "numpy", "--dtype", "bfloat16"], "numpy has float32 alone"),
        (["--chip", "h100-smx"], "did you mean 'h100-sxm'"),
        (["--chip", "h100-sxm", "--unknown"], "contradict"),
        (["--tables", "nowhere"], "device.csv: does not exist"),
        (["--tables", "nowhere", "--backend", "numpy"], "--backend: nothing is measured with --tables"),
        (["--tables", "nowhere", "--budget", "5s"], "--budget: nothing is measured with --tables"),
        (["--out", "My_Machine.toml"], "a chip is called as its file"),
        (["--out", "machine"], "a chip is called as its file"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simulator.calibration.device_measure._Bench", None)
    result = CliRunner().invoke(calibrate, ["device", *arguments])
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_torch_that_is_not_there_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"PyTorch is not installed: pip install 'chipseconds\[torch\]'"):
        TorchBackend()


class PretendedGPU:
    """As much of ``torch`` as timing on a GPU uses; each call takes 8 us of its clock, capturing none."""

    def __init__(self, *, captures: bool):
        self.now, self.calls, self.captures, self.capturing = 0.0, [], captures, False
        self.cuda = self
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda _: None)
        self.current_stream, self.synchronize = self.Stream, lambda: None
        self.stream = lambda _: nullcontext()

    def CUDAGraph(self):  # noqa: N802  # torch's name
        recorded = []
        return SimpleNamespace(recorded=recorded, replay=lambda: [self.run() for _ in recorded])

    @contextmanager
    def graph(self, graph):
        self.capturing = graph.recorded
        try:
            yield
        finally:
            self.capturing = False

    def Event(self, *, enable_timing):  # noqa: N802  # as above
        assert enable_timing
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def run(self):
        self.now += 2**-17

    def call(self, number):
        self.calls.append(number)
        if self.capturing is False:
            self.run()
        elif self.captures:
            self.capturing.append(number)
        else:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(("captures", "mode"), [(True, "graph"), (False, "eager")])
def test_calls_on_a_gpu_are_captured_or_queued_and_said_to_be(captures, mode):
    gpu, backend = PretendedGPU(captures=captures), object.__new__(TorchBackend)
    backend.torch, backend.mode, backend.on_gpu = gpu, "graph", True
    sample = backend.sampler(gpu.call, 2**-10)
    assert backend.mode == mode
    before = len(gpu.calls)
    assert sample() == 2**-17
    issued = len(gpu.calls) - before
    assert issued == (0 if captures else 128)  # calls of one sample, from Python or from the graph
    assert set(gpu.calls) == set(range(128))  # other operands each time


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99"])
def test_a_device_that_pytorch_does_not_see_is_refused(device):
    torch_backend()
    with pytest.raises(InputError, match=f"device '{device}'"):
        TorchBackend(device)


def test_files_that_exist_stay_and_places_that_cannot_be_written_are_named(saved, tiny, tmp_path):
    done, target, _ = saved
    before = target.file.read_bytes()
    with pytest.raises(InputError, match=r"my-machine\.toml: exists already"):
        target.check(overwrite=False)
    target.check(overwrite=True)
    assert target.file.read_bytes() == before
    (tmp_path / "file").write_text("")
    blocked = Target(tmp_path / "file" / "my-machine.toml")
    with pytest.raises(InputError, match="cannot be written"):
        blocked.check(overwrite=False)
    with pytest.raises(InputError, match="cannot be written"):
        save(done, tiny[0], blocked)


def test_the_command_writes_what_it_says_and_prints_one_document(saved, tmp_path):
    _, target, _ = saved
    out = tmp_path / "again.toml"
    arguments = ["device", "--tables", str(target.tables), "--out", str(out), "--json"]
    result = CliRunner().invoke(calibrate, arguments, catch_exceptions=False)
    document = json.loads(result.stdout)
    assert document["files"][0] == str(out)
    assert load_chip(str(out)).name == "again"
    assert document["known_as"] is None
    assert {fit["op"] for fit in document["fits"]} == {"gemm", "gemv", "attention_prefill", "attention_decode"}


def test_tables_that_were_spoiled_are_refused(tiny, tmp_path):
    list(write_tables(tiny[0], tmp_path))
    table = tmp_path / "gemm_numpy.csv"
    text = table.read_text()
    table.write_text(text.replace("latency_us", "latency"))
    with pytest.raises(InputError, match="no column 'latency_us'"):
        read_measurement(tmp_path)
    head, row, *rest = text.splitlines()
    cells = row.split(",")
    table.write_text("\n".join([head, ",".join([*cells[:4], "nan", *cells[5:]]), *rest]))
    with pytest.raises(InputError, match="0 < fastest_us <= latency_us"):
        read_measurement(tmp_path)
    table.unlink()
    with pytest.raises(InputError, match=r"gemm_numpy\.csv: does not exist"):
        read_measurement(tmp_path)


def test_too_little_is_refused():
    device = NumpyBackend().device
    few = Measurement(device, "numpy", "float32", "fp32", 4, "python", "2026-01-01", 2.0)
    timing = Timing(1e-3, 1e-3, 0.0, 4)
    shapes = {"gemm": (1, 64, 64), "attention_prefill": (1, 8, 1, 1, 8), "attention_decode": (1, 8, 1, 1, 8)}
    timings = {Key(table, shape): timing for table, shape in shapes.items()} | {Key("memory", ("copy", 1, 64)): timing}
    with pytest.raises(InputError, match="cannot fix"):
        calibrate_device(replace(few, timings=timings), "few", chip=None, command="test")
