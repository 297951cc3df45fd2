"""``chipseconds report``: a page of one result, or of several beside each other."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from simulator.cli.output import note

if TYPE_CHECKING:
    from simulator.results import Result
    from simulator.roofline.analysis import StepReport


@click.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FILE.html", help="Where the page is written."
)
def report(results: tuple[Path, ...], out: Path) -> None:
    """Write one self-contained HTML page about RESULTS: a folder that `simulate --out` wrote, or a file of `lifetime --out`.

    The page needs no network, follows light and dark, prints, and can be read without scripts. Several folders are compared
    with the first.
    """
    from simulator.report.html import comparison_page, lifetime_page, run_page, write_page
    from simulator.report.html.page import check_page_path
    from simulator.results import read_result
    from simulator.results.lifetime import read_lifetime

    check_page_path(out)
    if len(results) == 1 and results[0].is_file():
        write_page(lifetime_page(read_lifetime(results[0])), out)
        note(f"page written to {out}")
        return
    found = [read_result(path) for path in results]
    if len(found) == 1:
        page = run_page(found[0], step=_mean_step(results[0], found[0]))
    else:
        page = comparison_page(list(zip(_names(results), found, strict=True)))
    write_page(page, out)
    note(f"page written to {out}")


def _names(paths: tuple[Path, ...]) -> list[str]:
    """Names of folders, with as much of the path as tells them apart."""
    from simulator.errors import InputError

    full = [path.absolute() for path in paths]
    if len(set(full)) < len(full):
        raise InputError("the same result is given twice")
    for n in range(1, max(len(path.parts) for path in full) + 1):
        names = ["/".join(path.parts[-n:]) for path in full]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in full]


def _mean_step(folder: Path, result: "Result") -> "StepReport | None":
    """The decode step at a run's mean batch and context; None where a replica is several parts or batches nothing."""
    from simulator.roofline.analysis import step_report
    from simulator.run import load_scenario
    from simulator.run.fleets import resolve_fleet
    from simulator.run.resolve import resolve

    s = result.summary
    # Of several pools the last decodes.
    occupancy = s.pools[-1].occupancy if s.pools else s.occupancy
    batch = round(occupancy.mean_decode_batch)
    if batch < 1 or s.requests.finished == 0:
        return None
    scenario = load_scenario(str(folder))
    resolved = resolve_fleet(scenario).pools[-1] if scenario.pool else resolve(scenario)
    if resolved.cost.parts > 1:
        return None
    tokens = (s.requests.prompt_tokens + s.requests.output_tokens / 2) / s.requests.finished
    return step_report(resolved.deployment, decode=batch, context=max(1, round(tokens)))
