import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import InputError
from simulator.traffic import Stream

GOOD = {
    "arrival_s": [0.0, 1.0, 1.0, 2.5],
    "prompt_tokens": [5, 6, 7, 8],
    "output_tokens": [1, 2, 3, 4],
    "cached_tokens": [0, 5, 0, 7],
    "max_tokens": [1, 2, 9, 4],
}


def stream(*, concurrency=0, **changes):
    columns = GOOD | changes
    arrays = {k: np.array(v, dtype=np.float64 if k == "arrival_s" else np.int64) for k, v in columns.items()}
    return Stream(**arrays, concurrency=concurrency)


def test_ties_and_full_prefixes_are_accepted():
    assert len(stream()) == 4


@pytest.mark.parametrize(
    ("column", "row", "value", "rule"),
    [
        ("arrival_s", 1, np.nan, "must be finite and not negative"),
        ("arrival_s", 3, np.inf, "must be finite and not negative"),
        ("arrival_s", 0, -1.0, "must be finite and not negative"),
        ("arrival_s", 2, 0.5, "is earlier than the row before; sort the rows by time"),
        ("prompt_tokens", 2, 0, "must be a whole number of tokens, 1 … 2147483647"),
        ("output_tokens", 3, -4, "must be a whole number of tokens, 1 … 2147483647"),
        ("output_tokens", 3, 2**31, "must be a whole number of tokens, 1 … 2147483647"),
        ("cached_tokens", 1, 6, "must be a whole number of tokens, 0 … prompt_tokens − 1"),
        ("cached_tokens", 1, -1, "must be a whole number of tokens, 0 … prompt_tokens − 1"),
        ("max_tokens", 2, 2, "must be a whole number of tokens, at least output_tokens"),
    ],
)
def test_a_bad_row_is_named(column, row, value, rule):
    values = list(GOOD[column])
    values[row] = value
    with pytest.raises(InputError) as error:
        stream(**{column: values})
    shown = float(value) if column == "arrival_s" else value
    assert str(error.value).startswith(f"stream.{column}[{row}] = {shown}: {rule}")


def test_the_first_bad_row_is_the_one_named():
    with pytest.raises(InputError, match=r"stream\.output_tokens\[1\] = 0"):
        stream(prompt_tokens=[5, 6, 0, 8], output_tokens=[1, 0, 3, 4])


def test_think_times_of_a_closed_loop_may_fall():
    assert stream(concurrency=2, arrival_s=[0, 0, 5, 1]).concurrency == 2


def test_wrong_types_and_lengths_are_refused():
    with pytest.raises(InputError, match=r"stream\.max_tokens is int64\[3\]; must be int64\[4\]"):
        stream(max_tokens=[1, 2, 9])
    arrays = {k: np.array(v, dtype=np.float64) for k, v in GOOD.items()}
    with pytest.raises(InputError, match=r"stream\.prompt_tokens is float64\[4\]; must be int64\[4\]"):
        Stream(**arrays)
    with pytest.raises(InputError, match=r"concurrency = -1"):
        stream(concurrency=-1)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(1, 9)))
)
def test_a_stream_exists_exactly_when_its_rows_are_requests(rows):
    rows.sort(key=lambda row: row[0])
    arrays = [np.array([row[k] for row in rows], dtype=np.float64 if k == 0 else np.int64) for k in range(5)]
    sound = all(cached < prompt and limit >= output for _, prompt, output, cached, limit in rows)
    if sound:
        assert len(Stream(*arrays)) == len(rows)
    else:
        with pytest.raises(InputError):
            Stream(*arrays)
