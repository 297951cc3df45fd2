"""The gallery: its commands are good ones, and the committed files are those it makes."""

import re
import shlex

import click
import pytest

from simulator.cli import gallery
from simulator.cli.gallery import GALLERY, Piece, index_text
from simulator.cli.main import cli
from tests.conftest import ROOT

FOLDER = ROOT / "reports" / "gallery"
STEPS = sorted({step for piece in GALLERY for step in piece.steps})


@pytest.mark.parametrize("step", STEPS)
def test_steps_are_command_lines(step, tmp_path):
    name, *args = shlex.split(step.format(out=tmp_path, runs=tmp_path))
    command = cli.get_command(click.Context(cli), name)
    command.make_context(name, args)


def test_every_piece_is_written_by_its_steps():
    assert len({piece.file for piece in GALLERY}) == len(GALLERY)
    for piece in GALLERY:
        assert any(f"{{out}}/{piece.file}" in step for step in piece.steps), piece.file
        made = {word for step in piece.steps for word in re.findall(r"--out \{runs\}/(\S+)", step)}
        used = {word for step in piece.steps for word in re.findall(r"(?<!--out )\{runs\}/(\S+)", step)}
        assert used <= made


def test_committed_files_are_those_of_the_gallery():
    assert {path.name for path in FOLDER.iterdir()} == {"README.md", *(piece.file for piece in GALLERY)}
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == index_text(GALLERY)
    for path in FOLDER.iterdir():
        assert path.stat().st_size < 500_000, path.name


def test_command(run_cli, monkeypatch, tmp_path):
    steps = (
        "simulate overloaded --set traffic.n_requests=300 --out {runs}/run",
        "report {runs}/run --out {out}/run.html",
        "plan llama-3-8b-azure-chat --qps 10 --ttft 1e-6@50 --slices h100-sxm:1 --out {runs}/plan.json",
        "report {runs}/plan.json --out {out}/plan.html",
    )
    monkeypatch.setattr(
        gallery, "GALLERY", (Piece("run.html", "A run", steps[:2]), Piece("plan.html", "A plan", steps))
    )
    out = tmp_path / "gallery"
    said = run_cli("reproduce", "gallery", "--out", str(out)).stderr
    assert {path.name for path in out.iterdir()} == {"README.md", "run.html", "plan.html"}
    assert said.count("chipseconds ") == len(steps)
    assert "infeasible" in (out / "plan.html").read_text(encoding="utf-8")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    run_cli("reproduce", "gallery", "--out", str(out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    for args in (("gallery",), ("gallery", "napkin", "--out", str(out)), ("gallery", "--json", "--out", str(out))):
        assert "ask for it alone" in run_cli("reproduce", *args, code=2).stderr
