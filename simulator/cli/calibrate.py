"""``chipseconds calibrate``: measurements → parameters, with standard errors and errors on data left out."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from simulator.catalog.chips import load_chip
from simulator.cli.output import json_option, note, plain, print_json, print_table
from simulator.cli.validate import read_profiles
from simulator.errors import InputError
from simulator.units import format_si

if TYPE_CHECKING:
    from simulator.calibration.device_numpy import Backend
    from simulator.calibration.kernels import ChipCalibration


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
    for one in found:
        _print_fits(one, GOALS, regimes=regimes)


def _print_fits(one: "ChipCalibration", goals: "dict[str, float]", *, regimes: bool) -> None:
    """One line for each fitted curve, with its errors."""
    columns = ["fit", "kernels of", "rows", "in sample", "left out", "p90", "bias", "goal", "at a limit"]
    rows = []
    for fit in one.file.fits:
        every, *parts = fit.residuals
        name = " ".join(filter(None, (fit.op, fit.dtype, fit.kv_dtype and f"kv {fit.kv_dtype}"))) + (
            f" on {fit.chips}" if fit.chips > 1 else f", heads of {fit.head_dim}" if fit.head_dim else ""
        )
        goal = goals[fit.op]
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


@calibrate.command(short_help="This machine's GPU or CPU -> a chip file.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "numpy"]),
    default="auto",
    show_default=True,
    help="What runs the kernels; auto: PyTorch if it is installed, else numpy.",
)
@click.option(
    "--device", help="For PyTorch: cuda, cuda:N (that one alone) or cpu. Default: the first GPU, else the CPU."
)
@click.option("--dtype", help="For PyTorch: bfloat16 or float32. Default: bfloat16 where the device has units for it.")
@click.option("--chip", help="Chip of the catalogue that the device is. Default: the one its driver names, if any.")
@click.option("--unknown", is_flag=True, help="Take the device as unknown: peaks are the fastest seen.")
@click.option("--budget", metavar="TIME", help="Time to measure for: 5s, 2m …  [default: 100s]")
@click.option(
    "--tables", type=click.Path(path_type=Path), help="Fit a folder of earlier measurements instead of measuring."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="NAME.toml", help="Chip file to write.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option("--regimes", is_flag=True, help="Also list the errors by regime: small, middle and large shapes.")
@json_option
def device(
    backend: str,
    device: str | None,
    dtype: str | None,
    chip: str | None,
    budget: str | None,
    tables: Path | None,
    out: Path | None,
    *,
    unknown: bool,
    force: bool,
    regimes: bool,
    as_json: bool,
) -> None:
    """Measure this machine, and write it as a chip the other commands take.

    \b
    chipseconds calibrate device --out my-machine.toml
    chipseconds roofline --model qwen2.5-0.5b --slice my-machine.toml:1 --precision fp32 --decode 1 --context 512

    Products, attention, norms, copies and, with several GPUs, all-reduces are timed, and efficiency curves fitted to them as calibrate
    kernels does. Beside NAME.toml go NAME-kernels.toml, the curves, and NAME-tables/, the measurements. Nothing is
    written without --out. Measure while nothing else runs.
    """
    from simulator.calibration.device_chip import Target, calibrate_device, save
    from simulator.calibration.device_measure import measure
    from simulator.calibration.device_tables import read_measurement
    from simulator.calibration.kernels import GOALS

    if unknown and chip is not None:
        raise InputError(f"--chip {chip} and --unknown contradict each other")
    if chip is not None:
        load_chip(chip)  # before minutes of measuring
    allowed_s = _seconds(budget or "100s")
    target = None if out is None else Target(out)
    if target is not None:
        target.check(overwrite=force)
    options = {"--device": device is not None, "--dtype": dtype is not None, "--budget": budget is not None}
    options |= {"--backend": backend != "auto"}
    for option, given in options.items():
        if given and tables is not None:
            raise InputError(f"{option}: nothing is measured with --tables")
    if tables is not None:
        measured = read_measurement(tables)
    else:
        measured = measure(_backend(backend, device, dtype), allowed_s, progress=note)
    name = "this-machine" if target is None else target.name
    # What gives the same files again, where they are; measuring again would not.
    command = f"chipseconds calibrate device --tables {name}-tables" + (" --unknown" if unknown else "")
    command += (f" --chip {chip}" if chip else "") + f" --out {name}.toml"
    done = calibrate_device(
        measured,
        name,
        chip="" if unknown else chip,
        command=command,
        progress=note,
    )
    written = [] if target is None else save(done, measured, target)
    for file in written:
        note(f"wrote {file}")
    if as_json:
        print_json(
            {
                "device": vars(measured.device),
                "framework": measured.framework,
                "dtype": measured.dtype,
                "mode": measured.mode,
                "date": measured.date,
                "known_as": done.known_as,
                "peak_flops_per_s": measured.peak_flops_per_s,
                "bandwidth_bytes_per_s": measured.bandwidth_bytes_per_s,
                "link_bytes_per_s": measured.link_bytes_per_s,
                "constants": done.constants,
                "rows": {table: len(measured.of(table)) for table in ("gemm", "attention_prefill", "attention_decode")},
                "fits": done.fit.file.fits,
                "goals_median_abs": GOALS,
                "notes": done.notes,
                "files": [str(file) for file in written],
            }
        )
        return
    _print_fits(done.fit, GOALS, regimes=regimes)
    rate, moved = measured.peak_flops_per_s, measured.bandwidth_bytes_per_s
    click.echo(
        f"\n{measured.device.name}: "
        + (f"{done.known_as} of the catalogue" if done.known_as else "not in the catalogue")
    )
    click.echo(f"fastest seen: {format_si(rate, 'FLOP/s')} in {measured.chip_dtype}, {format_si(moved, 'B/s')}")
    for line in done.notes:
        click.echo(f"note: {line}")


def _backend(name: str, device: str | None, dtype: str | None) -> "Backend":
    """The back-end asked for."""
    from importlib.util import find_spec

    from simulator.calibration.device_numpy import NumpyBackend
    from simulator.calibration.device_torch import TorchBackend

    if name == "torch" or (name == "auto" and find_spec("torch") is not None):
        return TorchBackend(device, dtype)
    for option, value, only in (("--device", device, "cpu"), ("--dtype", dtype, "float32")):
        if value not in {None, only}:
            raise InputError(
                f"{option} {value}: numpy has {only} alone; this needs PyTorch (pip install 'chipseconds[torch]')"
            )
    return NumpyBackend()


def _seconds(text: str) -> float:
    """A time such as 5s, 90, 2m or 2min. [s]"""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min)?", text.strip())
    if found is None:
        raise InputError(f"--budget {text!r}: write seconds or minutes, such as 5s, 90s or 2m")
    return float(found[1]) * (60 if found[2] in {"m", "min"} else 1)


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
    """Fit engine profiles to measured serving runs, through the simulator.

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
        # Without the errors of the profiles it started from: the record is the same whatever they were.
        record = {name: value for name, value in result.document.items() if name != "before"}
        (out / "accuracy.json").write_text(json.dumps(plain(record), indent=1) + "\n", encoding="utf-8")
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
