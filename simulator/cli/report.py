"""``chipseconds report``: a page of results: of a run, a plan, a lifetime study, or of several beside each other."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simulator.cli.output import note

if TYPE_CHECKING:
    from simulator.report.html import Page
    from simulator.results import Result
    from simulator.roofline.analysis import StepReport


@click.command()
@click.argument("results", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FILE.html", help="Where the page is written."
)
def report(results: tuple[Path, ...], out: Path) -> None:
    r"""Write one self-contained HTML page about RESULTS: what `simulate`, `plan` or `lifetime` wrote with `--out`.

    \b
    chipseconds report runs/h100 --out h100.html
    chipseconds report runs/h100 runs/h200 --out both.html
    chipseconds report runs/h100 plan.json study.json --out all.html

    The page needs no network, follows light and dark, prints, and can be read without scripts. Several runs are compared
    with the first; of different kinds of results each has a part of the page.
    """
    from simulator.report.html import write_page
    from simulator.report.html.page import check_page_path

    check_page_path(out)
    write_page(page_of(results), out)
    note(f"page written to {out}")


def page_of(results: tuple[Path, ...]) -> "Page":
    """The page of some results: runs first, then plans, then studies of a lifetime.

    Raises
    ------
    InputError
        If one is no result, is damaged, or is named twice.
    """
    from simulator.report.html import comparison_page, joined_pages, lifetime_page, plan_page, run_page
    from simulator.results import read_result
    from simulator.results.lifetime import is_lifetime, read_lifetime
    from simulator.results.plan import is_plan, read_plan

    names = dict(zip(results, _names(results), strict=True))
    plans = [path for path in results if is_plan(path)]
    studies = [path for path in results if is_lifetime(path)]
    folders = [path for path in results if path not in plans and path not in studies]
    for path in folders:
        if path.is_file():
            raise _no_result(path)
    runs = [read_result(path) for path in folders]
    pages = []
    if len(runs) == 1:
        pages.append(run_page(runs[0], step=_mean_step(folders[0], runs[0])))
    elif runs:
        pages.append(comparison_page([(names[path], run) for path, run in zip(folders, runs, strict=True)]))
    files = {path: plan_page(read_plan(path)) for path in plans}
    files |= {path: lifetime_page(read_lifetime(path)) for path in studies}
    titles = Counter(page.title for page in files.values())
    for path, page in files.items():
        pages.append(page if titles[page.title] == 1 else replace(page, title=f"{page.title} ({names[path]})"))
    return pages[0] if len(pages) == 1 else joined_pages(pages)


def _no_result(path: Path) -> Exception:
    from simulator.errors import InputError

    return InputError(
        f"{path}: a file, but neither a plan nor a lifetime study; name a folder of simulate --out, or a file of plan --out or "
        "lifetime --out"
    )


def _names(paths: tuple[Path, ...]) -> list[str]:
    """Names of results, with as much of the path as tells them apart."""
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
