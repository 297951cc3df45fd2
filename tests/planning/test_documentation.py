"""docs/planning.md: its code runs."""

import re
from pathlib import Path


def test_the_python_of_the_page_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code, "docs/planning.md", "exec"), {})  # noqa: S102 - our own page
    chips, chip_seconds, usd = map(float, capsys.readouterr().out.split())
    assert chips / 100 == chip_seconds
    assert 0 < usd < 1
