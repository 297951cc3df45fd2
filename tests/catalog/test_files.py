"""Reading a file into a record: what is refused, and what the message says."""

import pytest

from simulator.catalog.chips import load_chip
from simulator.catalog.files import find, parse, read_toml
from simulator.catalog.records import Quantity, Record
from simulator.errors import InputError


class Inner(Record):
    width: int


class Outer(Record):
    rate: float
    inner: Inner
    names: tuple[str, ...] = ()


GOOD = {"rate": 1, "inner": {"width": 3}, "names": ["a", "b"]}


def test_integers_are_floats_and_lists_are_tuples():
    assert parse(Outer, GOOD, "f").names == ("a", "b")
    assert parse(Outer, GOOD, "f").rate == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rate": "1"}, "f: rate = '1': Input should be a valid number"),
        ({"rate": True}, "f: rate = True"),
        ({"rate": float("nan")}, "f: rate = nan"),
        ({"inner": {"width": 3.5}}, "f: inner.width = 3.5"),
        ({"inner": {"width": 3.0}}, "f: inner.width = 3.0"),
        ({"inner": {}}, "f: inner.width: required, but missing"),
        ({"inner": {"width": 3, "widht": 4}}, "f: unknown field 'inner.widht'; did you mean 'width'?"),
        ({"names": "ab"}, "f: names = 'ab'"),
    ],
)
def test_one_clear_message(change, said):
    with pytest.raises(InputError) as error:
        parse(Outer, GOOD | change, "f")
    assert said in str(error.value)


def test_dates_of_toml(tmp_path):
    file = tmp_path / "q.toml"
    file.write_text('value = 1\nunit = "GB"\nsource = "s"\nkind = "assumed"\nretrieved = 2026-01-02\n')
    assert parse(Quantity, read_toml(file), "q").retrieved.isoformat() == "2026-01-02"
    file.write_text(file.read_text().replace("2026-01-02", '"soon"'))
    with pytest.raises(InputError, match=r"q: retrieved = 'soon'"):
        parse(Quantity, read_toml(file), "q")


def test_a_quantity_has_a_value_or_is_not_published():
    common = {"unit": "GB", "source": "s", "retrieved": "2026-01-02"}
    for extra in ({"kind": "datasheet"}, {"kind": "not_published", "value": 3}):
        with pytest.raises(InputError, match="a value is required unless"):
            parse(Quantity, common | extra, "f")


def test_syntax_errors_and_missing_files(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = 1\n")
    with pytest.raises(InputError, match=r"broken\.toml: not valid TOML: .*line 1"):
        read_toml(broken)
    broken.write_bytes(b"a = '\xff'\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_toml(broken)
    with pytest.raises(InputError, match="does not exist"):
        find("chip", "nowhere/chip.toml", tmp_path)
    with pytest.raises(InputError, match=r"unknown chip 'h100-smx'; did you mean .*'h100-sxm'"):
        load_chip("h100-smx")
