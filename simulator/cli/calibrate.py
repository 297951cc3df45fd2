"""``chipseconds calibrate``: measurements → parameters, with standard errors and errors on data left out."""

import json
import os
from pathlib import Path

import click

from simulator.cli.output import json_option, note, plain, print_json, print_table
from simulator.cli.validate import read_profiles


@click.group()
def calibrate() -> None:
    """Fit the cost model to measurements, and see how far off it stays on data left out."""


@calibrate.command(short_help="Measured serving runs -> engine profiles.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--engine-profile", "profiles", multiple=True, metavar="FILE", help="Profile to start from for its engine; repeatable.")
@click.option("--splits", help="Refit without parts of the rows: random, release, group, or several by commas.")
@click.option("--select", help="Only tables whose file name contains this.")
@click.option("--workers", type=click.IntRange(1), help="Processes. Default: one per core.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for one profile file per engine, and accuracy.json.")
@json_option
def serving(
    data: Path,
    profiles: tuple[str, ...],
    splits: str | None,
    select: str | None,
    workers: int | None,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    r"""Fit engine profiles to measured serving runs, through the simulator.

    \b
    chipseconds calibrate serving my-benchmarks/ --out profiles
    chipseconds simulate mine.toml --set engine.profile=profiles/vllm.toml

    DATA is a table of serving rows, a per-request log, a result of `vllm bench serve --save-result`, or a folder of them
    (docs/accuracy.md). Printed are the errors before and after, what moved, standard errors, and what the data cannot tell
    apart. Nothing is written without --out.
    """
    from simulator.calibration.report import calibrate_serving

    command = f"chipseconds calibrate serving {data}" + (f" --select {select}" if select else "")
    wanted = [name.strip() for name in (splits or "").split(",") if name.strip()]
    result = calibrate_serving(
        data,
        base=read_profiles(profiles),
        splits=wanted,
        select=select,
        workers=workers or os.cpu_count() or 1,
        command=command + (f" --splits {','.join(wanted)}" if wanted else "") + (f" --out {out}" if out else ""),
        say=note,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "accuracy.json").write_text(json.dumps(plain(result.document), indent=1) + "\n", encoding="utf-8")
        note(f"wrote {out / 'accuracy.json'}")
        for name, text in result.profile_files.items():
            (out / f"{name}.toml").write_text(text, encoding="utf-8")
            note(f"wrote {out / name}.toml")
    if as_json:
        print_json(result.document)
        return
    for title, columns, rows in result.tables:
        print_table(f"\n{title}", columns, rows)
    for warning in result.fit.warnings:
        click.echo(f"! {warning}")
