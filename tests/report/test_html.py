"""Pages: self-contained, escaped, the same bytes again, and right figures; one test opens them in a browser."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from simulator.errors import InputError
from simulator.report import figures
from simulator.report.html import comparison_page, page_html, run_page, write_page
from simulator.report.html.inline import inline_svg
from simulator.report.html.page import Bars, Card, Grid, Page, Section
from simulator.report.tables import number, seconds
from simulator.results import write_result
from simulator.run import load_scenario, run_scenario

VOID = {"meta", "link", "br", "img", "input"}


class _Checked(HTMLParser):
    """Every element closed where it was opened; what a page asks a network for."""

    def __init__(self):
        super().__init__()
        self.open, self.wanted, self.ids, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.wanted += [named[key] for key in ("src", "href", "data", "poster") if named.get(key)]
        self.ids += [named["id"]] if "id" in named else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in {"style", "script"}:
            self.text.append(data)


def checked(text):
    parser = _Checked()
    parser.feed(text)
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def runs():
    """The shipped chat scenario, short, on two chips; and one that is overloaded."""
    short = ["traffic.n_requests=600"]
    names = {
        "h100": ["llama-3-8b-azure-chat", *short],
        "h200": ["llama-3-8b-azure-chat", *short, "slice=h200-sxm:1"],
        "overloaded": ["overloaded"],
    }
    return {key: run_scenario(load_scenario(name, sets)).result for key, (name, *sets) in names.items()}


@pytest.mark.parametrize("key", ["h100", "overloaded"])
def test_page_of_a_run_is_whole_and_self_contained(runs, key):
    text = page_html(run_page(runs[key]))
    page = checked(text)
    outside = [target for target in page.wanted if not target.startswith(("#", "data:,"))]
    assert outside == []
    assert "url(http" not in text
    assert "@import" not in text
    assert len(text.encode()) < 3e6
    assert len(set(page.ids)) == len(page.ids)
    local = {target[1:] for target in page.wanted if target.startswith("#") and len(target) > 1}
    assert local <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)


def test_page_shows_the_summary_s_figures(runs):
    result = runs["h100"]
    s = result.summary
    words = " ".join(" ".join(checked(page_html(run_page(result))).text).split())
    for shown in (
        number(s.chip_seconds_per_query.provisioned),
        number(s.chip_seconds_per_query.ideal),
        seconds(s.latency.ttft_s.p50.value),
        seconds(s.latency.e2e_s.p99.value),
        s.deployment.model,
        "Poisson" if "Poisson" in s.deployment.traffic else "poisson",
    ):
        assert shown in words
    for assumption in s.assumptions:
        assert assumption.what in words
        assert " ".join(assumption.source.split()) in words


def test_overloaded_run_has_no_percentiles(runs):
    words = " ".join(checked(page_html(run_page(runs["overloaded"]))).text)
    assert "OVERLOADED" in words
    assert "no steady state" in words
    assert "TTFT, median" not in words


def test_same_result_gives_the_same_bytes(runs):
    assert page_html(run_page(runs["h100"])) == page_html(run_page(runs["h100"]))


def test_waterfall_of_chip_seconds_ends_at_what_is_provisioned(runs):
    for result in runs.values():
        (cost,) = (section for section in run_page(result).sections if section.key == "cost")
        (bars,) = (block for block in cost.blocks if isinstance(block, Bars))
        c = result.summary.chip_seconds_per_query
        assert (bars.bars[0].stop, bars.bars[-1].stop) == (pytest.approx(c.ideal / c.provisioned), 1.0)
        for before, after in zip(bars.bars[1:-1], bars.bars[2:-1], strict=False):
            assert after.start == pytest.approx(before.stop)
        assert bars.bars[-2].stop == pytest.approx(1.0)


def test_fleet_sizes_cover_their_rate(runs):
    s = runs["h100"].summary
    (cost,) = (section for section in run_page(runs["h100"]).sections if section.key == "cost")
    table = next(block for block in cost.blocks if isinstance(block, Grid) and "queries per second" in block.columns)
    for qps, replicas, chips, _ in table.rows:
        need = float(qps.replace(",", "")) * s.chip_seconds_per_query.provisioned
        assert need <= int(chips.replace(",", "")) < need + s.deployment.chips_per_replica
        assert int(chips.replace(",", "")) == int(replicas.replace(",", "")) * s.deployment.chips_per_replica


def test_texts_are_escaped(runs):
    result = runs["h100"]
    sly = result.summary.model_copy(update={"scenario": "<script>alert(1)</script>", "warnings": ["a < b & c"]})
    text = page_html(run_page(replace(result, summary=sly)))
    assert "<script>alert" not in text
    assert "a &lt; b &amp; c" in text
    checked(text)


def test_figures_take_the_page_s_colours():
    def draw():
        figure, axes = figures.compact()
        axes.plot([0, 1], [0, 1], color=figures.BLUE)
        axes.set_title("a < b")
        return figure

    svg = str(inline_svg(draw, label='x "y"', key="k"))
    assert "var(--blue)" in svg
    assert not re.search(r"#[0-9a-fA-F]{6}", svg)
    assert "a &lt; b" in svg
    assert 'aria-label="x &#34;y&#34;"' in svg
    assert str(inline_svg(draw, label="x", key="other")) != svg.replace("x &#34;y&#34;", "x")


def test_comparison_names_what_differs(runs):
    page = comparison_page([("a", runs["h100"]), ("b", runs["h200"])])
    words = " ".join(checked(page_html(page)).text)
    assert "h200-sxm:1" in words
    (settings,) = (section for section in page.sections if section.key == "settings")
    assert [row[0] for row in settings.blocks[0].rows] == ["slice"]
    same = comparison_page([("a", runs["h100"]), ("b", runs["h100"])])
    assert "None" in " ".join(checked(page_html(same)).text)
    assert {card.tone for card in same.cards} == {"plain"}


@pytest.mark.parametrize(
    ("name", "message"), [("page.pdf", "must end in .html"), ("missing/page.html", "does not exist")]
)
def test_paths_are_refused_before_the_work(tmp_path, name, message):
    page = Page("t", (), (Card("a", "1"),), (Section("s", "S", ()),))
    with pytest.raises(InputError, match=message):
        write_page(page, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_command(run_cli, runs, tmp_path):
    for key in ("h100", "h200"):
        write_result(runs[key], tmp_path / key)
    page = tmp_path / "page.html"
    run_cli("report", str(tmp_path / "h100"), "--out", str(page))
    assert "roofline of a decode step" in page.read_text(encoding="utf-8")
    run_cli("report", str(tmp_path / "h100"), str(tmp_path / "h200"), "--out", str(page))
    assert "Settings that differ" in page.read_text(encoding="utf-8")
    twice = run_cli("report", str(tmp_path / "h100"), str(tmp_path / "h100"), "--out", str(page), code=2)
    assert "twice" in twice.stderr
    missing = run_cli("report", str(tmp_path / "nothing"), "--out", str(page), code=2)
    assert "no such result folder" in missing.stderr


def test_browser_opens_the_page_without_errors(runs, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra 'browser'")
    path = tmp_path / "page.html"
    write_page(run_page(runs["h100"]), path)
    said = []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
            tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
            tab.goto(Path(path).as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
            before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            tab.click("#theme")
            assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
            tab.close()
        plain = chromium.new_page(java_script_enabled=False)
        plain.goto(Path(path).as_uri())
        assert "What users see" in plain.inner_text("main")
        chromium.close()
    assert said == []
