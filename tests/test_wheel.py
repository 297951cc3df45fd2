"""What users install: one import package, with every data file inside."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_only_the_package_and_its_metadata(names):
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"simulator"}
    assert len(top) == 2


@pytest.mark.parametrize("folder", ["hardware_specs", "workloads"])
def test_every_data_file_is_inside(names, folder):
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.toml")}
    packed = {name.removeprefix("simulator/_data/") for name in names if name.startswith(f"simulator/_data/{folder}/")}
    assert len(ours) > 5
    assert packed == ours


def test_tables_types_and_every_module_are_inside(names):
    assert "simulator/py.typed" in names
    assert "simulator/reproduction/data/napkin.csv" in names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "simulator").rglob("*.py")}
    assert modules <= set(names)


def test_data_folders_hold_no_code():
    assert not [p for f in ("hardware_specs", "workloads") for p in (ROOT / f).rglob("*.py")]
