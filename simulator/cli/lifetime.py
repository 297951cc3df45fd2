"""``chipseconds lifetime``: the model that costs least to train and to serve."""

import os
from pathlib import Path

import click

from simulator.cli.output import json_option, note, print_json


@click.command()
@click.argument("scenario")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field; may be repeated.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw cost against size, and regret.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.json", help="Write the study, for `report`.")
@click.option("--workers", type=click.IntRange(1), help="Sizes planned for at the same time. Default: all cores.")
@json_option
def lifetime(
    scenario: str, overrides: tuple[str, ...], plot: Path | None, out: Path | None, workers: int | None, as_json: bool
) -> None:
    """Which size, trained on how many tokens, reaches a quality at the least cost of training and serving.

    \b
    chipseconds lifetime sardana-23b
    chipseconds lifetime llama-3-8b-15t --set demand.queries=1e13 --plot lifetime.png

    SCENARIO is a shipped name or a TOML file (docs/lifetime.md). Serving is priced by a formula, or by planning the cheapest
    fleet within the SLO for every size.
    """
    from simulator.errors import InputError
    from simulator.lifetime.scenario import load_lifetime
    from simulator.lifetime.study import study
    from simulator.report.figures import check_figure_path, save_figure
    from simulator.report.lifetime_plot import draw_lifetime
    from simulator.report.lifetime_tables import lifetime_text
    from simulator.results.lifetime import write_lifetime

    if plot is not None:
        check_figure_path(plot)
    if out is not None and (out.suffix != ".json" or not out.parent.is_dir()):
        raise InputError(f"--out {out}: a .json file in a folder that exists")
    found = study(load_lifetime(scenario, overrides), workers=workers or os.cpu_count() or 1, progress=note)
    if out is not None:
        write_lifetime(found, out)
        note(f"study written to {out}")
    if plot is not None:
        save_figure(lambda: draw_lifetime(found), plot)
        note(f"plot written to {plot}")
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        click.echo(lifetime_text(found), nl=False)
