import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from simulator.errors import InputError
from simulator.traffic import read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROWS = [
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:50.9951690,396,109",
    "2023-11-16 18:15:50.9951690,879,55",
]


def write(folder, name, text):
    data = text if isinstance(text, bytes) else text.encode()
    file = folder / name
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


def message(file, **options):
    with pytest.raises(InputError) as error:
        read_trace(file, **options)
    assert str(error.value).startswith((str(file), f"trace file '{file}'")) or "trace format" in str(error.value)
    return str(error.value).removeprefix(str(file))


# --- the traces of the shared folder, unmodified -------------------------------------------------------------------

TRACES = [
    # file, format, rows, Σ prompt, Σ output, last arrival [s], rows at the time of the row before
    ("AzureLLMInferenceTrace_conv.csv.gz", "azure", 19_366, 22_361_870, 4_088_665, 3501.721937, 0),
    ("AzureLLMInferenceTrace_code.csv.gz", "azure", 8_819, 18_059_974, 245_896, 3435.948056, 0),
    ("mooncake_conversation_trace.jsonl.gz", "mooncake", 12_031, 144_793_823, 4_122_048, 3536.999, 10_851),
    ("mooncake_synthetic_trace.jsonl.gz", "mooncake", 3_993, 61_194_628, 595_432, 1022.025, 11),
    ("vidur_arxiv_summarization_lengths.csv.gz", "vidur", 28_257, 73_131_321, 8_234_948, None, None),
    ("llmservingsim_sharegpt-llama-3.1-8b-300-sps10.csv", "plain", 300, 257_239, 195_753, 29.183763, 0),
    ("llmservingsim_sharegpt-qwen3-32b-300-sps10.csv", "plain", 300, 258_691, 199_486, 29.183763, 0),
    ("llmservingsim_sharegpt-qwen3-30b-a3b-300-sps10.csv", "plain", 300, 258_691, 199_486, 29.183763, 0),
]


@pytest.mark.parametrize(("name", "form", "rows", "prompt", "output", "last_s", "ties"), TRACES)
def test_shared_traces_read_unmodified(shared, name, form, rows, prompt, output, last_s, ties):
    trace = read_trace(shared / "data" / "traces" / name)
    assert (trace.format, len(trace), trace.n_dropped) == (form, rows, 0)
    assert (trace.prompt_tokens.sum(), trace.output_tokens.sum()) == (prompt, output)
    if last_s is None:
        assert trace.arrival_s is None
    else:
        assert trace.arrival_s[-1] == pytest.approx(last_s, abs=1e-9)
        assert (np.diff(trace.arrival_s) == 0).sum() == ties


def test_every_shared_trace_is_in_the_table(shared):
    files = {file.name for file in (shared / "data" / "traces").iterdir()} - {"README.md"}
    assert files == {row[0] for row in TRACES}


def test_azure_conversation_has_the_published_figures(shared):
    """Row count, rate, means and medians as the README of the traces gives them."""
    trace = read_trace(shared / "data" / "traces" / "AzureLLMInferenceTrace_conv.csv.gz")
    assert len(trace) / trace.arrival_s[-1] == pytest.approx(5.53, abs=0.005)
    assert (round(trace.prompt_tokens.mean()), round(trace.output_tokens.mean())) == (1155, 211)
    assert (np.median(trace.prompt_tokens), np.median(trace.output_tokens)) == (1020, 129)


def test_a_second_reader_in_plain_python_agrees(shared):
    file = shared / "data" / "traces" / "AzureLLMInferenceTrace_code.csv.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()[1:]
    cells = [line.split(",") for line in lines]
    when = np.array([cell[0] for cell in cells], dtype="datetime64[ns]")
    trace = read_trace(file)
    assert np.array_equal(trace.arrival_s, (when - when[0]).astype(np.int64) / 1e9)
    assert trace.prompt_tokens.tolist() == [int(cell[1]) for cell in cells]
    assert trace.output_tokens.tolist() == [int(cell[2]) for cell in cells]


def test_notes_say_what_was_left_aside(shared):
    folder = shared / "data" / "traces"
    assert "prefix_hit" in read_trace(folder / "llmservingsim_sharegpt-qwen3-32b-300-sps10.csv").notes[0]


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("final", [True, False])
def test_csv(tmp_path, name, line_end, final):
    trace = read_trace(write(tmp_path, name, line_end.join([HEADER, *ROWS, ""] if final else [HEADER, *ROWS])))
    assert trace.format == "azure"
    assert trace.arrival_s.tolist() == [0, 4.314579, 4.314579]
    assert trace.prompt_tokens.tolist() == [374, 396, 879]


@pytest.mark.parametrize(
    "text",
    [
        f"{HEADER}\r\n{ROWS[0]}\r\n{ROWS[1]}\n{ROWS[2]}\n",  # mixed line ends, as after appending by hand
        f"\ufeff{HEADER}\n\n{ROWS[0]}\n\n\n{ROWS[1]}\n{ROWS[2]}\n\n",  # byte order mark and blank lines
        f'{HEADER},note\n{ROWS[0]},"a\nb"\n{ROWS[1]},"1,2"\n{ROWS[2]},""\n',  # quotes
    ],
)
def test_unusual_but_whole_csv_reads_alike(tmp_path, text):
    trace = read_trace(write(tmp_path, "t.csv", text))
    assert trace.prompt_tokens.tolist() == [374, 396, 879]
    assert trace.arrival_s.tolist() == [0, 4.314579, 4.314579]


def test_plain_names_in_any_case_and_order(tmp_path):
    text = "Output Tokens,id, Arrival_S ,INPUT_TOKENS,cached_tokens,max_tokens\n7,x,0.5,100,64,8\n8,y,0.5,200,0,8\n"
    trace = read_trace(write(tmp_path, "t.csv", text))
    assert trace.format == "plain"
    assert trace.arrival_s.tolist() == [0.5, 0.5]
    assert [c.tolist() for c in (trace.prompt_tokens, trace.output_tokens)] == [[100, 200], [7, 8]]
    assert [c.tolist() for c in (trace.cached_tokens, trace.max_tokens)] == [[64, 0], [8, 8]]
    assert trace.columns["arrival_s"] == " Arrival_S "


def test_jsonl_with_missing_optional_columns_and_blank_lines(tmp_path):
    text = '{"prompt": 3, "output": 4, "arrival": 1.5}\n\n{"arrival": 2, "output": 6, "prompt": 5, "x": [1]}\n'
    trace = read_trace(write(tmp_path, "t.jsonl.gz", text))
    assert trace.arrival_s.tolist() == [1.5, 2.0]
    assert trace.prompt_tokens.tolist() == [3, 5]


def test_names_decide_the_unit_of_time(tmp_path):
    columns = {"timestamp": "mooncake", "timestamp_ms": "plain"}
    for time_column, form in columns.items():
        names = ("input_length", "output_length") if form == "mooncake" else ("input_tokens", "output_tokens")
        text = "".join(json.dumps({time_column: t, names[0]: 1, names[1]: 1}) + "\n" for t in (0, 40, 27482))
        trace = read_trace(write(tmp_path, "t.jsonl", text))
        assert trace.format == form
        assert trace.arrival_s.tolist() == [0.0, 0.04, 27.482]


@pytest.mark.parametrize("kind", ["DOUBLE", "TIMESTAMP", "TIMESTAMP_NS"])
def test_parquet(tmp_path, kind):
    import duckdb

    file = tmp_path / "it's [1].parquet"
    value = (
        "i * 0.25" if kind == "DOUBLE" else f"(TIMESTAMP '2024-05-10 00:00:00' + i * INTERVAL 250 MILLISECOND)::{kind}"
    )
    duckdb.sql(
        f"SELECT {value} AS arrival, i + 1 AS prompt, (i + 2)::DOUBLE AS output FROM range(5000) t(i)"  # noqa: S608 - our own text
    ).write_parquet(str(file))
    trace = read_trace(file)
    assert np.array_equal(trace.arrival_s, np.arange(5000) * 0.25)
    assert np.array_equal(trace.prompt_tokens, np.arange(5000) + 1)


def test_parquet_rows_count_from_one(tmp_path):
    import duckdb

    file = tmp_path / "t.parquet"
    duckdb.sql("SELECT i AS arrival, 3 - i AS prompt, 1 AS output FROM range(5) t(i)").write_parquet(str(file))
    assert message(file) == ": row 4: prompt = '0': must be a whole number of tokens, 1 … 2147483647"
    file.write_bytes(b"PAR1 no")
    assert "cannot be read" in message(file)


def test_dates_of_the_2024_azure_traces_and_unix_times_count_from_the_first_row(tmp_path):
    rows = ["2024-05-10 00:00:00.009930+00:00,1,1", "2024-05-10T00:00:01.009930Z,1,1", "2024-05-10 00:00:02.009930,1,1"]
    trace = read_trace(write(tmp_path, "t.csv", "\n".join([HEADER, *rows])))
    assert trace.arrival_s.tolist() == [0, 1, 2]
    trace = read_trace(write(tmp_path, "u.csv", "timestamp,prompt,output\n1700000000.25,1,1\n1700000001.5,1,1\n"))
    assert trace.arrival_s.tolist() == [0, 1.25]
    assert trace.notes == ("times count from the first row",)


def test_a_stated_format_wins_and_is_checked(tmp_path):
    file = write(tmp_path, "t.csv", "timestamp,input_length,output_length,prompt_tokens,output_tokens\n1000,1,2,3,4\n")
    assert read_trace(file).prompt_tokens.tolist() == [1]
    assert read_trace(file, format_name="plain").prompt_tokens.tolist() == [3]
    assert message(file, format_name="azure").startswith(
        ":1: no column for prompt_tokens (azure format: contexttokens); found: "
    )
    assert message(file, format_name="azur") == "unknown trace format 'azur'; did you mean 'azure'?"


# --- broken files --------------------------------------------------------------------------------------------------

TOKENS = "must be a whole number of tokens, 1 … 2147483647"
DATE = "must be a UTC date and time such as 2023-11-16 18:15:46.68"

BROKEN_CELLS = [
    # cells of the row that is broken, and the message from the column's name on
    ("2023-11-16 18:15:51,-5,44", f"ContextTokens = '-5': {TOKENS}"),
    ("2023-11-16 18:15:51,0,44", f"ContextTokens = '0': {TOKENS}"),
    ("2023-11-16 18:15:51,3.7,44", f"ContextTokens = '3.7': {TOKENS}"),
    ("2023-11-16 18:15:51,nan,44", f"ContextTokens = 'nan': {TOKENS}"),
    ("2023-11-16 18:15:51,5,inf", f"GeneratedTokens = 'inf': {TOKENS}"),
    ("2023-11-16 18:15:51,5,1e400", f"GeneratedTokens = '1e400': {TOKENS}"),
    ("2023-11-16 18:15:51,5,99999999999999999999", f"GeneratedTokens = '99999999999999999999': {TOKENS}"),
    ("2023-11-16 18:15:51,many,44", f"ContextTokens = 'many': {TOKENS}"),
    ("2023-11-16 18:15:51,5,0", f"GeneratedTokens = '0': {TOKENS}"),
    ("2023-11-16 18:15:51,5,", "GeneratedTokens: missing value"),
    ("2023-11-16 18:15:51,  ,5", "ContextTokens: missing value"),
    (",5,5", "TIMESTAMP: missing value"),
    ("2023-13-16 18:15:51,5,5", f"TIMESTAMP = '2023-13-16 18:15:51': {DATE}"),
    ("2023-11-16 18:15:51+02:00,5,5", f"TIMESTAMP = '2023-11-16 18:15:51+02:00': {DATE}"),
    ("17.5,5,5", f"TIMESTAMP = '17.5': {DATE}"),
    (
        "2023-11-16 18:15:49,5,5",
        "TIMESTAMP = '2023-11-16 18:15:49': is earlier than the row before; sort the rows by time",
    ),
]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize(("row", "expected"), BROKEN_CELLS)
def test_a_broken_csv_cell_is_named_with_its_line(tmp_path, name, row, expected):
    # The blank line, the quoted line break and the two-line note are what makes row number and line number differ.
    text = f'{HEADER},note\n{ROWS[0]},"two\nlines"\n\n{ROWS[1]},\n{row},\n{ROWS[2]},\n'
    assert message(write(tmp_path, name, text)) == f":6: {expected}"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ('{"timestamp": 41, "input_length": -1, "output_length": 1}', f"input_length = '-1': {TOKENS}"),
        ('{"timestamp": 41, "input_length": 2.5, "output_length": 1}', f"input_length = '2.5': {TOKENS}"),
        ('{"timestamp": 41, "input_length": 1, "output_length": NaN}', f"output_length = 'nan': {TOKENS}"),
        ('{"timestamp": 41, "input_length": true, "output_length": 1}', f"input_length = 'True': {TOKENS}"),
        ('{"timestamp": 41, "input_length": null, "output_length": 1}', "input_length: missing value"),
        ('{"timestamp": 41, "input_length": 1}', "output_length: missing value"),
        (
            '{"timestamp": -1, "input_length": 1, "output_length": 1}',
            "timestamp = '-1': must be finite and not negative",
        ),
        (
            '{"timestamp": "soon", "input_length": 1, "output_length": 1}',
            "timestamp = 'soon': must be a number of seconds",
        ),
        (
            '{"timestamp": 39, "input_length": 1, "output_length": 1}',
            "timestamp = '39': is earlier than the row before",
        ),
        ('{"timestamp": 41, "input_length": 1,', "not one JSON object per line: "),
        ('{"timestamp": 41} {"timestamp": 42}', "not one JSON object per line: Extra data"),
        ("[41, 1, 1]", "a JSON list, not an object"),
    ],
)
@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson.gz"])
def test_a_broken_json_line_is_named(tmp_path, name, cells, expected):
    good = '{"timestamp": 40, "input_length": 1, "output_length": 1, "hash_ids": [1]}\n'
    assert message(write(tmp_path, name, f"{good}\n{good}{cells}\n")).startswith(f":4: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ":1: the file is empty"),
        ("\n", ":1: empty, but the first line must name the columns"),
        (HEADER + "\n", ": has columns, but no rows"),
        (f"{HEADER}\n{ROWS[0]}\n1,2\n", ":3: 2 values, but the header names 3 columns"),
        (f"{HEADER}\n{ROWS[0]}\n\n{ROWS[1]},4\n", ":4: 4 values, but the header names 3 columns"),
        (f'{HEADER}\n{ROWS[0]}\n"2023,1,1\n', ":3: not valid CSV: unexpected end of data"),
        (f"{HEADER}\n{ROWS[0]}\n".encode() + b"2023-11-16 18:15:51,1,\xe9\n", ": not UTF-8 text after line "),
        ("TIMESTAMP,ContextTokens\n1,2\n", ":1: no column for prompt_tokens (plain format: prompt_tokens, "),
        ("prompt,arrival\n1,2\n", ":1: no column for output_tokens (plain format: output_tokens, "),
        ("prompt,Prompt,output\n1,1,2\n", ":1: two columns are called 'prompt'"),
        ("timestamp,prompt,output\n1700000000250,1,1\n", ":2: timestamp = '1700000000250': is no time in seconds"),
        (
            "arrival,prompt,output,cached_tokens\n0,5,5,5\n",
            ":2: cached_tokens = '5': must be a whole number of tokens, 0 …",
        ),
        (
            "arrival,prompt,output,max_tokens\n0,5,5,5\n0,5,5,4\n",
            ":3: max_tokens = '4': must be a whole number of tokens, at",
        ),
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_broken_csv_file_is_named(tmp_path, name, text, expected):
    assert message(write(tmp_path, name, text)).startswith(expected)


def test_files_that_are_no_traces(tmp_path):
    assert message(tmp_path / "none.csv") == f"trace file '{tmp_path / 'none.csv'}' does not exist"
    assert message(write(tmp_path, "t.xlsx", "")).startswith(": not a kind of file traces are read from: .csv, ")
    assert message(write(tmp_path, "t.jsonl", "")) == ":1: the file is empty"
    (tmp_path / "plain.csv.gz").write_text("a,b\n")
    assert message(tmp_path / "plain.csv.gz").startswith(": not a whole gzip file, broken after line 0: ")
    whole = write(tmp_path, "cut.csv.gz", "\n".join([HEADER] + ROWS[:1] * 50_000)).read_bytes()
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    assert message(tmp_path / "cut.csv.gz").startswith(": not a whole gzip file, broken after line ")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_bad_row_appended_to_the_real_trace_is_found(shared, tmp_path, line_end):
    file = shared / "data" / "traces" / "AzureLLMInferenceTrace_conv.csv.gz"
    data = gzip.decompress(file.read_bytes()) + line_end.encode() + f"2023-11-16 19:15:00.0,100,-1{line_end}".encode()
    for name in ("t.csv", "t.csv.gz"):
        assert message(write(tmp_path, name, data)) == f":19368: GeneratedTokens = '-1': {TOKENS}"


def test_the_first_of_several_faults_is_told(tmp_path):
    rows = [ROWS[0], "2023-11-16 18:15:51,5,x", "2023-11-16 18:15:52,-5,1", "bad,5,5"]
    assert message(write(tmp_path, "t.csv", "\n".join([HEADER, *rows]))).startswith(":3: GeneratedTokens = 'x'")


def test_drop_invalid_drops_and_counts_but_never_reorders(tmp_path):
    rows = ["bad,5,5", ROWS[0], "2023-11-16 18:15:47,0,1", ROWS[1], "2023-11-16 18:15:51,5,", ROWS[2]]
    file = write(tmp_path, "t.csv", "\n".join([HEADER, *rows]))
    trace = read_trace(file, drop_invalid=True)
    assert trace.n_dropped == 3
    assert trace.notes[0] == "3 of 6 rows were invalid and dropped"
    assert trace.arrival_s.tolist() == [0, 4.314579, 4.314579]
    late = write(tmp_path, "late.csv", "\n".join([HEADER, *rows, ROWS[0]]))
    assert message(late, drop_invalid=True).startswith(":8: TIMESTAMP = '2023-11-16 18:15:46.6805900': is earlier")
    none = write(tmp_path, "none.csv", f"{HEADER}\nbad,1,1\n")
    assert message(none, drop_invalid=True) == ": drop_invalid leaves none of its 1 rows"


def test_reading_is_lazy_about_duckdb():
    import subprocess
    import sys

    code = "import sys, simulator.traffic; print('duckdb' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"
