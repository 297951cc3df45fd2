"""Room: the result schema — tables, summary, result folders, comparison. Depends on nothing but the unit helpers."""

from simulator.results.compare import ColumnDifference, Comparison, Difference, compare_results
from simulator.results.store import Result, check_writable, is_result, read_result, summary_json, write_result
from simulator.results.summary import SCHEMA_VERSION, Summary
from simulator.results.tables import REQUEST_COLUMNS, REQUEST_STATES, TIMELINE_COLUMNS, Column, Table

__all__ = [
    "REQUEST_COLUMNS",
    "REQUEST_STATES",
    "SCHEMA_VERSION",
    "TIMELINE_COLUMNS",
    "Column",
    "ColumnDifference",
    "Comparison",
    "Difference",
    "Result",
    "Summary",
    "Table",
    "check_writable",
    "compare_results",
    "is_result",
    "read_result",
    "summary_json",
    "write_result",
]
