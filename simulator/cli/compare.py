"""``chipseconds compare``: what differs between two results."""

from pathlib import Path

import click

from simulator.cli.output import json_option, print_json


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--all", "everything", is_flag=True, help="List every figure that differs.")
@json_option
def compare(a: Path, b: Path, everything: bool, as_json: bool) -> None:
    """Compare result folders A and B: which inputs and figures differ, by how much, and how many requests.

    Requests are joined by their index in the stream. Exit code 0 whether or not anything differs.
    """
    from simulator.report.comparison import comparison_text
    from simulator.results import compare_results, read_result

    found = compare_results(read_result(a), read_result(b))
    if as_json:
        print_json({"equal": found.equal, **_document(found)})
    else:
        click.echo(comparison_text(found, str(a), str(b), everything=everything), nl=False)


def _document(found: object) -> dict[str, object]:
    from dataclasses import asdict, is_dataclass

    if not is_dataclass(found) or isinstance(found, type):
        raise TypeError(f"{found!r} is not a comparison")
    return asdict(found)
