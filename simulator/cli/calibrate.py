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


@calibrate.command(short_help="Kernel times -> a chip's efficiency curves.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--chip", help="Chip the tables are of: a name of the catalogue or a chip file. Else the folders' names say it."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for one TOML file per chip.")
@click.option("--regimes", is_flag=True, help="Also list the errors by regime: small, middle and large shapes.")
@json_option
def kernels(data: Path, chip: str | None, out: Path | None, *, regimes: bool, as_json: bool) -> None:
    """Fit efficiency curves to measured kernel times.

    DATA is a folder of tables such as gemm_vllm.csv.gz, one such table, or a folder of such folders named after chips. The
    tables' columns are in docs/calibration.md. Nothing is written without --out; a chip file uses the written file by
    calibration = "FILE.toml".
    """
    from simulator.calibration.kernels import GOALS, calibrate_chip, toml_lines
    from simulator.calibration.kernels_tables import chip_folders

    command = (
        f"chipseconds calibrate kernels {data}" + (f" --chip {chip}" if chip else "") + (f" --out {out}" if out else "")
    )
    source = ("aiconfigurator-kernels",) if chip is None else (str(data),)
    found = [
        calibrate_chip(name, folder, command=command, source=source, progress=note)
        for name, folder in chip_folders(data, chip).items()
    ]
    for one in found:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            file = out / f"{one.file.chip}.toml"
            file.write_text("\n".join(toml_lines(one.file)) + "\n", encoding="utf-8")
            note(f"wrote {file}")
    if as_json:
        print_json({"chips": [one.file for one in found], "goals_median_abs": GOALS})
        return
    columns = ["fit", "kernels of", "rows", "in sample", "left out", "p90", "bias", "goal", "at a limit"]
    for one in found:
        rows = []
        for fit in one.file.fits:
            every, *parts = fit.residuals
            name = " ".join(filter(None, (fit.op, fit.dtype, fit.kv_dtype and f"kv {fit.kv_dtype}"))) + (
                f" on {fit.chips}" if fit.chips > 1 else f", heads of {fit.head_dim}" if fit.head_dim else ""
            )
            goal = GOALS[fit.op]
            rows.append(
                [
                    name,
                    fit.framework,
                    f"{fit.rows:,}",
                    f"{fit.in_sample_median_abs:.1%}",
                    f"{every.median_abs:.1%}" + ("" if every.median_abs <= goal else " !"),
                    f"{every.p90_abs:.1%}",
                    f"{every.bias:+.1%}",
                    f"{goal:.0%}",
                    ", ".join(fit.at_limit),
                ]
            )
            if regimes:
                rows += [
                    [
                        f"  {p.regime}",
                        "",
                        f"{p.rows:,}",
                        "",
                        f"{p.median_abs:.1%}",
                        f"{p.p90_abs:.1%}",
                        f"{p.bias:+.1%}",
                        "",
                        "",
                    ]
                    for p in parts
                ]
        print_table(
            f"{one.file.chip}: predicted against measured kernel times",
            columns,
            rows,
            note="errors are relative; left out: shapes the parameters were not fitted to; ! above the goal for the median",
        )


@calibrate.command(short_help="Measured serving runs -> engine profiles.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--engine-profile",
    "profiles",
    multiple=True,
    metavar="FILE",
    help="Profile to start from for its engine; repeatable.",
)
@click.option("--splits", help="Refit without parts of the rows: random, release, group, or several by commas.")
@click.option("--select", help="Fit only tables whose name contains this, and predict the others.")
@click.option("--workers", type=click.IntRange(1), help="Processes. Default: one per core.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for one profile file per engine, and accuracy.json.",
)
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
        command=command + (f" --splits {','.join(wanted)}" if wanted else ""),
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
