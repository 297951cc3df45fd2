"""The machine-code cache cannot go stale, and the engine runs without Numba, with the same results."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simulator.engine import jit

ENGINE = Path(jit.__file__).parent
ROOT = ENGINE.parents[1]

RUN = """
import json, sys
if {hide}:
    sys.modules["numba"] = None
import numpy as np
from simulator.engine import jit
from simulator.engine.compiled import simulate
from simulator.engine.records import EngineSettings, Requests
from simulator.roofline.step_cost import StepCost
n = np.arange(33.0)
cost = StepCost(n / 7 + (n > 0), n[:5] / 9, np.array([0.0, 40.0]), np.array([0.0, 1.0]), np.array([0.025, 0.05]), 0.01,
                np.array([[0.001, 0.0, 0.1]]), 1, n, n, n, n, 1.0, 1.0, 1.0, 1.0)
k = np.arange(1, 21)
requests = Requests(k / 3.0, 1 + 7 * k % 30, 1 + 5 * k % 19, 0 * k, 1 + 5 * k % 19)
result = simulate(cost, EngineSettings(4, 32, 4, 20), requests)
print(json.dumps([jit.is_compiled_mode(), result.finish_s.tolist(), result.busy_s.tolist(), result.totals]))
"""


def run(*, hide: bool, cache: Path, **environment: str) -> list:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), **environment}
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(hide=hide)], capture_output=True, text=True, env=env, check=True
    )
    return json.loads(done.stdout)


def test_without_numba_the_same_results(tmp_path):
    absent = run(hide=True, cache=tmp_path)
    disabled = run(hide=False, cache=tmp_path, NUMBA_DISABLE_JIT="1")
    compiled = run(hide=False, cache=Path.home() / ".cache")
    assert [absent[0], disabled[0], compiled[0]] == [False, False, True]
    assert absent[3]["preemptions"] > 0
    assert absent[1:] == disabled[1:] == compiled[1:]


def test_every_compiled_module_enters_the_cache_key():
    def imports(name: str) -> set[str]:
        tree = ast.parse((ENGINE / name).read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        return {m.rsplit(".", 1)[1] + ".py" for m in modules if m.startswith("simulator.engine.")}

    compiled = {
        p.name
        for p in ENGINE.glob("*.py")
        if re.search(
            r"^@(entry|compiled|compiled_once|inlined|inlined_entry|inlined_or_none)$", p.read_text(), re.MULTILINE
        )
    }
    needed = compiled | {m for name in compiled for m in imports(name)}
    assert needed <= set(jit.COMPILED_SOURCES)


@pytest.mark.parametrize("name", jit.COMPILED_SOURCES)
def test_editing_a_helper_changes_the_cache_folder(tmp_path, name):
    for source in jit.COMPILED_SOURCES:
        shutil.copy(ENGINE / source, tmp_path)
    before = jit.source_digest(tmp_path)
    assert before == jit.source_digest(ENGINE)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n# edited\n")
    assert jit.source_digest(tmp_path) != before


def test_an_unwritable_cache_directory_is_no_obstacle(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    script = "from simulator.engine import jit; print(jit.CACHE_FOLDER, jit.is_warm())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(blocked)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["None", "False"]


def decorated(tree: ast.Module) -> dict[str, str]:
    """Compiled functions of a module, and how they are compiled."""
    kinds = {"entry", "compiled", "compiled_once", "inlined", "inlined_entry", "inlined_or_none"}
    return {
        node.name: mark.id
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for mark in node.decorator_list
        if isinstance(mark, ast.Name) and mark.id in kinds
    }


def test_python_calls_only_functions_that_are_compiled_for_it():
    """The others have no wrapper: a call from Python would end the process."""
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "simulator").rglob("*.py")}
    inner = {
        f"{path.stem}.{name}"
        for path, tree in trees.items()
        if path.parent == ENGINE
        for name, mark in decorated(tree).items()
        if mark not in {"entry", "inlined_entry"}
    }
    assert len(inner) > 100
    wrong = []
    for path, tree in trees.items():
        marks = decorated(tree)
        known = {name: f"{path.stem}.{name}" for name in marks}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simulator.engine."):
                known |= {
                    alias.asname or alias.name: f"{node.module.split('.')[-1]}.{alias.name}" for alias in node.names
                }
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or (function.name in marks and function in tree.body):
                continue
            for call in ast.walk(function):
                target = call.func if isinstance(call, ast.Call) else None
                if isinstance(target, ast.Name):
                    name = known.get(target.id, "")
                elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    name = f"{target.value.id}.{target.attr}"
                else:
                    continue
                if name in inner:
                    wrong.append(f"{path.name}: {function.name} calls {name}")
    assert not wrong


RECORDS = """
from typing import NamedTuple
import json
import numpy as np
from simulator.engine import jit
class Inner(NamedTuple):
    on: bool
    values: np.ndarray
class Outer(NamedTuple):
    inner: Inner
    scale: float
    nothing: None
    counts: np.ndarray
class Foreign(NamedTuple):
    values: np.ndarray
    scale: float
Inner.__module__ = Outer.__module__ = "simulator.engine.{module}"
@jit.inlined
def part(outer, g):
    return Outer(Inner(not outer.inner.on, outer.inner.values[g:]), outer.scale + g, outer.nothing, outer.counts)
@jit.compiled
def total(outer, twin):
    found = 0.0
    for i in range(len(outer.inner.values)):
        outer.counts[i] += 1
        if outer.inner.on and twin.nothing is None:
            found += outer.scale * twin.inner.values[i]
    return found
@jit.entry
def run(outer, foreign):
    found = total(outer, outer)
    for g in range(3):
        mine = part(outer, g)
        other = part(part(outer, 1), g)
        found += 10.0 * total(mine, other) + 100.0 * total(other, outer)
    return found + foreign.scale * foreign.values[-1]
counts = np.zeros(5, dtype=np.int64)
outer = Outer(Inner(True, np.arange(5.0)), 0.5, None, counts)
answers = [run(outer, Foreign(np.arange(3.0), 7.0)), counts.tolist()]
print(json.dumps([jit.is_compiled_mode(), *answers]))
"""


def test_records_by_address_give_what_python_gives(tmp_path):
    """Records within records, made and handed back by compiled functions, two names of one, and a tuple of another package."""

    def run_records(module: str, **environment: str) -> list:
        script = tmp_path / f"{module}.py"
        script.write_text(RECORDS.replace("{module}", module))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), **environment}
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=True)
        return json.loads(done.stdout)

    python = run_records("python", NUMBA_DISABLE_JIT="1")
    compiled = run_records("compiled", NUMBA_DISABLE_JIT="0")
    assert [python[0], compiled[0]] == [False, True]
    assert python[1:] == compiled[1:]
    assert python[1] > 0
    assert min(python[2]) > 0


CALLS = """
import json
import numpy as np
from simulator.engine import jit
@jit.compiled
def below(a, i):
    return a[i] + 1
@jit.inlined
def inner(a, i):
    return below(a, i) * 2
@jit.entry
def run(a, b):
    found = 0.0
    for i in range(len(a)):
        found += inner(a, i) + below(a, i) + inner(b, i) * below(b, i) + a[i] ** 2 // 3 - (b[i] < a[i])
    return found
a, b = np.arange(1.0, 6.0), np.arange(2, 7)
print(json.dumps([run(a, b), run(b, a), run(a, a)]))
"""


def test_helpers_become_machine_code_with_what_python_calls(tmp_path):
    """Only what Python calls goes to the disk cache; a process that finds it there needs no helper, and one without the means gives the same."""
    script = tmp_path / "calls.py"
    ask = """
kinds = {f.__name__: list(f.overloads.values()) for f in (inner, below, run)}
print(json.dumps([
    jit.PIPELINES is not None,
    {name: sorted({one.fndesc.inline for one in made}) for name, made in kinds.items()},
    sorted(p.name.split("-")[0].split(".")[-1] for p in jit.CACHE_FOLDER.rglob("*.nbi")),
]))
"""
    another = 'from simulator.engine import link_once\nlink_once.NEEDED["CodeLibrary"] = ("of another Numba",)\n'
    found = []
    for start, cache in (("", "ours"), ("", "ours"), (another, "plain")):
        script.write_text(start + CALLS + ask)
        os.utime(script, (1e9, 1e9))  # or Numba would compile anew for the script's time
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / cache), "NUMBA_DISABLE_JIT": "0"}
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=True)
        found.append([json.loads(line) for line in done.stdout.splitlines()])
    (first, how), (second, again), (other, otherwise) = found
    assert first == second == other
    # a helper is part of its callers if it says so, not because one that does made Numba compile it
    assert how == [True, {"inner": [True], "below": [False], "run": [False]}, ["run"]]
    assert again == [True, {"inner": [], "below": [], "run": [False]}, ["run"]]
    assert otherwise == [False, {"inner": [True], "below": [False], "run": [False]}, ["below", "inner", "run"]]


def test_calls_that_are_known_come_to_the_same(tmp_path):
    script = tmp_path / "known.py"
    script.write_text(CALLS)
    answers = []
    for off in ("0", "1"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "NUMBA_DISABLE_JIT": off}
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=True)
        answers.append(json.loads(done.stdout))
    assert answers[0] == answers[1]
