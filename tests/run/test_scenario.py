"""Scenarios: overrides, defaults, paths, and refusals that name the field and the nearest name."""

import tomllib
from pathlib import Path

import pytest

from simulator.catalog.overrides import parse_value
from simulator.errors import InfeasibleError, InputError
from simulator.results import toml
from simulator.run import Scenario, load_scenario, run_scenario, scenario_names
from simulator.run.resolve import resolve

NAME = "llama-3-8b-azure-chat"


@pytest.mark.parametrize("name", scenario_names())
def test_every_shipped_scenario_loads_resolves_and_carries_its_own_name(name):
    scenario = load_scenario(name)
    assert scenario.name == name
    assert scenario.description
    assert resolve(scenario).settings.num_kv_blocks > 0


def test_a_resolved_scenario_reads_back_as_itself(tmp_path):
    scenario = load_scenario(NAME, ["efficiency=ideal", "engine.max_model_len=4096"])
    file = tmp_path / "again.toml"
    file.write_text(toml.dumps(scenario.as_toml()))
    assert load_scenario(str(file)) == scenario
    assert tomllib.loads(file.read_text())["engine"]["gpu_memory_utilization"] == 0.9


@pytest.mark.parametrize(
    ("override", "look"),
    [
        ("replicas=4", lambda s: s.replicas == 4),
        ("slice=h100-sxm:8", lambda s: s.slice == "h100-sxm:8"),
        ('model="llama-3-70b"', lambda s: s.model == "llama-3-70b"),
        ("engine.max_num_seqs=64", lambda s: s.engine.max_num_seqs == 64),
        ("engine.scheduler_reserve_full_isl=false", lambda s: not s.engine.scheduler_reserve_full_isl),
        ("efficiency.matmul=0.5", lambda s: s.efficiency.overrides == {"matmul": 0.5}),
        ("efficiency=ideal", lambda s: s.efficiency.base == "ideal"),
        ("traffic.arrival.rate_per_s=2", lambda s: s.traffic.arrival.rate_per_s == 2),
        ("traffic.prompt=100", lambda s: s.traffic.prompt.tokens == 100),
        ("slo.ttft_s = 0.25", lambda s: s.slo.ttft_s == 0.25),
        ("prices.usd_per_chip_hour=1e1", lambda s: s.prices.usd_per_chip_hour == 10),
    ],
)
def test_overrides_are_typed_by_toml_and_words_are_strings(override, look):
    assert look(load_scenario(NAME, [override]))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("3", 3),
        ("3.0", 3.0),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("a b", "a b"),
        ("4x4", "4x4"),
        ("1\nx = 2", "1\nx = 2"),
        ("", ""),
    ],
)
def test_override_values(written, value):
    assert parse_value(written) == value


def test_a_word_in_the_file_becomes_a_table_when_a_part_of_it_is_set(tmp_path):
    file = tmp_path / "s.toml"
    data = load_scenario(NAME).as_toml() | {"efficiency": "ideal"}
    file.write_text(toml.dumps(data))
    scenario = load_scenario(str(file), ["efficiency.hbm=0.5"])
    assert scenario.efficiency.base == "ideal"
    assert scenario.efficiency.overrides == {"hbm": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.max_num_seq=3", "unknown field 'engine.max_num_seq'; did you mean 'max_num_seqs'"),
        ("replica=3", "unknown field 'replica'; did you mean 'replicas'"),
        ("replicas=0", "replicas = 0: .*greater than 0"),
        ("replicas=many", "replicas = 'many'"),
        ("slo.percentile=101", "slo.percentile = 101"),
        ("traffic.arrival.rate_per_s=0", "rate_per_s = 0"),
        ("traffic.mix=azure-chat", None),
        ("model.x=1", "model = 'llama-3-8b' is a value, not a table"),
        ("noequals", "write path=value"),
        ("=3", "write path=value"),
        ("engine.=3", "write path=value"),
        ("engine.max_num_batched_tokens=100", "max_num_batched_tokens = 100 is less than max_num_seqs = 256"),
        ("run.warm_up_fraction=0.99", "leave nothing to measure"),
        ("schema_version=2", "schema_version = 2"),
        ("model=llama-3-8", "did you mean"),
        ("slice=h100-sxm:3", "h100-sxm"),
        ("precision=w3a16", "precision"),
        ("sharding.tp=2", "tp"),
        ("efficiency=best", "efficiency.base"),
        ("efficiency.matmul=1.5", "efficiency.matmul = 1.5"),
    ],
)
def test_nonsense_is_refused_in_words(override, message):
    with pytest.raises(InputError, match=message):
        run_scenario(load_scenario(NAME, [override, "traffic.n_requests=10"] if "=" in override else [override]))


def test_what_does_not_fit_is_the_answer_no():
    with pytest.raises(InfeasibleError, match="does not fit"):
        run_scenario(load_scenario(NAME, ["model=llama-3-70b"]))
    with pytest.raises(InfeasibleError, match="all 20 requests were rejected"):
        run_scenario(load_scenario(NAME, ["engine.max_model_len=2", "traffic.n_requests=20"]))


def test_unknown_scenarios_and_files():
    with pytest.raises(InputError, match="did you mean 'web-agent'"):
        load_scenario("web-agnet")
    with pytest.raises(InputError, match="does not exist"):
        load_scenario("nowhere/x.toml")


def test_paths_in_a_file_start_from_the_file_and_in_an_override_from_here(tmp_path, monkeypatch):
    folder = tmp_path / "scenarios"
    folder.mkdir()
    (folder / "mine.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1,20,5\n")
    (tmp_path / "here.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,30,5\n")
    data = load_scenario(NAME).as_toml()
    data["traffic"] = {"trace": "mine.csv"}
    (folder / "s.toml").write_text(toml.dumps(data))
    monkeypatch.chdir(tmp_path)
    scenario = load_scenario("scenarios/s.toml")
    assert scenario.traffic.trace.file == str(folder / "mine.csv")
    run = run_scenario(scenario)
    assert run.summary.requests.total == 2
    assert str(tmp_path) not in run.summary.model_dump_json()
    assert "mine.csv" in run.summary.deployment.traffic
    assert len(run.result.inputs["traffic.trace"]) == 64
    changed = load_scenario("scenarios/s.toml", ["traffic.trace=here.csv"])
    assert changed.traffic.trace.file == str(tmp_path / "here.csv")


def test_setting_a_trace_replaces_the_scenarios_traffic(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i},10,5\n" for i in range(50)))
    plain = load_scenario(NAME, [f"traffic.trace={file}"])
    assert plain.traffic.mix is plain.traffic.n_requests is plain.traffic.arrival is None
    assert run_scenario(plain).result.requests["arrival_s"].tolist() == list(range(50))
    faster = load_scenario(
        NAME, ["traffic.n_requests=20", f"traffic.trace={file}", 'traffic.arrival={process="offline"}']
    )
    assert run_scenario(faster).result.requests["arrival_s"].tolist() == [0.0] * 20


def test_closed_loops_need_a_client_per_replica():
    closed = ['traffic.arrival={process="closed", concurrency=2}', "traffic.n_requests=20"]
    assert run_scenario(load_scenario(NAME, [*closed, "replicas=2"])).summary.load.load is None
    with pytest.raises(InputError, match="2 closed-loop clients"):
        run_scenario(load_scenario(NAME, [*closed, "replicas=3"]))


def test_a_block_override_replaces_the_memory_check():
    scenario = load_scenario(NAME, ["model=llama-3-70b", "engine.num_gpu_blocks_override=1001"])
    assert resolve(scenario).settings.num_kv_blocks == 1000


def fields(record, path=""):
    for name, field in record.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and hasattr(kind, "model_fields") and kind.__module__.startswith("simulator.run"):
            yield from fields(kind, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def test_every_field_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "scenarios.md").read_text(encoding="utf-8")
    assert [name for name in fields(Scenario) if f"`{name.rpartition('.')[2]}`" not in text] == []


def test_layout_and_costs_reach_the_deployment():
    def resolved(*overrides):
        return resolve(load_scenario("llama-3-70b-v5e-chat", ["engine.max_num_batched_tokens=512", *overrides]))

    plain = resolved()
    changed = resolved("sharding.layout=2d", "sharding.looped_exchange=true", "deployment.dequantization_flops=200")
    assert changed.deployment.layout == "2d"
    assert changed.deployment.looped_exchange
    assert changed.deployment.dequantization_flops == 200
    assert changed.cost.dense_s[64] != plain.cost.dense_s[64]
    assert resolved("deployment.expert_imbalance=2").deployment.expert_imbalance == 2
    for bad in ("deployment.expert_imbalance=0.9", "deployment.dequantization_flops=-1", "deployment.imbalance=2"):
        with pytest.raises(InputError, match=r"deployment"):
            load_scenario("llama-3-70b-v5e-chat", [bad])
    with pytest.raises(InputError, match="no axis z"):
        resolved("sharding.layout=2d-z")
