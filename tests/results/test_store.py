"""Result folders: equal runs give equal bytes, a folder is whole or absent, nothing else is overwritten."""

import json
import tomllib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.results import (
    REQUEST_COLUMNS,
    TIMELINE_COLUMNS,
    check_writable,
    compare_results,
    read_result,
    toml,
    write_result,
)
from simulator.results.store import Result
from simulator.results.summary import Summary
from simulator.results.tables import as_table


def table(columns, rows, seed=0):
    rng = np.random.default_rng(seed)
    values = {}
    for column in columns:
        if column.dtype.startswith("float64"):
            array = rng.exponential(size=rows)
            if column.nullable:
                array[::7] = np.nan
        else:
            array = rng.integers(0, 5, rows)
        values[column.name] = array
    return as_table(columns, values, what="drawn")


def filled(model, value=1):
    """Build a record with every required field filled with some value of its type."""
    data = {}
    for name, field in model.model_fields.items():
        if not field.is_required():
            continue
        annotation = field.annotation
        options = getattr(annotation, "__args__", (annotation,))
        kind = options[0]
        if hasattr(kind, "model_fields"):
            data[name] = filled(kind)
        elif kind is str and annotation is not str:  # dict[str, float]
            data[name] = {"part": 1.0}
        else:
            data[name] = {str: "text", "ok": "ok"}.get(kind, value)
    return data


@pytest.fixture(scope="module")
def result():
    return Result(
        scenario={"schema_version": 1, "name": "x", "traffic": {"rate_per_s": 2.5}},
        summary=Summary.model_validate(filled(Summary)),
        requests=table(REQUEST_COLUMNS, 300),
        timeline=table(TIMELINE_COLUMNS, 20),
        seed=3,
        versions={"chipseconds": "0"},
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_result_survives_writing_and_reading(result, tmp_path):
    write_result(result, tmp_path / "run")
    back = read_result(tmp_path / "run")
    assert back.summary == result.summary
    assert back.scenario == result.scenario
    for name, column in result.requests.items():
        np.testing.assert_array_equal(back.requests[name], column)
    for name, column in result.timeline.items():
        np.testing.assert_array_equal(back.timeline[name], column)
    assert compare_results(result, back).equal


def test_writing_twice_gives_the_same_bytes_and_leaves_no_debris(result, tmp_path):
    write_result(result, tmp_path / "one")
    write_result(result, tmp_path / "two")
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    write_result(result, tmp_path / "one")
    assert first == contents(tmp_path / "one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_a_folder_that_is_not_a_result_is_left_alone(result, tmp_path):
    (tmp_path / "precious").write_text("mine")
    for folder in (tmp_path, tmp_path / "precious"):
        with pytest.raises(InputError, match="--out"):
            check_writable(folder)
        with pytest.raises(InputError, match="--out"):
            write_result(result, folder)
    assert contents(tmp_path) == {"precious": b"mine"}


def test_other_files_in_a_result_folder_survive_a_new_run(result, tmp_path):
    write_result(result, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    write_result(result, tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_parent_that_is_a_file_is_refused(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        write_result(result, tmp_path / "file" / "run")


def test_a_full_disk_is_said_in_words(result, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simulator.results.store._write_text", full)
    with pytest.raises(InputError, match="No space left"):
        write_result(result, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_result_whole(result, tmp_path):
    folder = tmp_path / "run"
    write_result(result, folder)
    before = contents(folder)
    broken = Result(result.scenario, result.summary, {"request": np.arange(3)}, result.timeline, seed=1)
    with pytest.raises(InputError, match="missing columns"):
        write_result(broken, folder)
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("meta.json", "{}", "not a result folder"),
        ("meta.json", json.dumps({"format": "chipseconds-result", "schema_version": 99}), "schema version 99"),
        ("summary.json", "{", "damaged result"),
        ("scenario.toml", "a = [", "damaged result"),
        ("requests.parquet", "no", "not a table"),
    ],
)
def test_a_damaged_folder_is_refused_in_words(result, tmp_path, file, text, message):
    write_result(result, tmp_path / "run")
    (tmp_path / "run" / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_result(tmp_path / "run")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such result folder"):
        read_result(tmp_path / "nowhere")


def test_null_is_refused_where_the_schema_allows_none(result):
    values = dict(result.requests)
    values["chip_s_busy"] = np.full(300, np.nan)
    with pytest.raises(InputError, match=r"chip_s_busy\[0\]"):
        as_table(REQUEST_COLUMNS, values, what="requests")


def test_comparison_names_each_difference_and_its_size(result):
    requests = {name: column.copy() for name, column in result.requests.items()}
    requests["e2e_s"][5] *= 2
    requests["output_tokens"][7] += 1
    changed = Result(
        {**result.scenario, "traffic": {"rate_per_s": 5.0}},
        result.summary.model_copy(update={"seed": 3}),
        requests,
        result.timeline,
        seed=3,
        versions=result.versions,
    )
    found = compare_results(result, changed)
    assert [(d.path, d.relative) for d in found.scenario] == [("traffic.rate_per_s", 1.0)]
    assert [d.path for d in found.summary] == ["seed"]
    by_column = {c.column: c for c in found.requests}
    assert set(by_column) == {"e2e_s", "output_tokens"}
    assert by_column["e2e_s"].max_relative == 1.0
    assert by_column["e2e_s"].first_row == 5
    assert by_column["output_tokens"].max_absolute == 1
    assert not found.equal


text = st.text(st.characters(codec="ascii") | st.sampled_from("é−βγ×漢\U0001f600\x7f\x85"), max_size=5)
values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(text, values, max_size=4))
def test_toml_round_trip(data):
    assert tomllib.loads(toml.dumps(data)) == data
