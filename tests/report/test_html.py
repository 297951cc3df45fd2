"""Pages: self-contained, escaped, the same bytes again, and right figures; one test opens them in a browser."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from simulator.errors import InputError
from simulator.lifetime.scenario import load_lifetime
from simulator.lifetime.study import study
from simulator.planning import PlanOptions, plan, targets_of
from simulator.report import figures
from simulator.report.forms import number, seconds, usd
from simulator.report.html import (
    comparison_page,
    joined_pages,
    lifetime_page,
    page_html,
    plan_page,
    run_page,
    write_page,
)
from simulator.report.html.inline import inline_svg
from simulator.report.html.page import Bars, Card, Grid, Page, Picture, Section
from simulator.report.plan_tables import scaled_rows
from simulator.results import write_result
from simulator.results.lifetime import write_lifetime
from simulator.results.plan import write_plan
from simulator.results.summary import Intervals, ParameterInterval
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


CASES = {
    "summary only": ["run.summary_only=true"],
    "stages": [
        "model=llama-3-70b",
        "slice=h100-sxm:4",
        "sharding.pp=2",
        "sharding.tp=2",
        "traffic.arrival.rate_per_s=2",
    ],
    "closed loop": ['traffic.arrival={process="closed", concurrency=8}'],
    "all at once": ['traffic.arrival={process="offline"}'],
    "one token": ["traffic.output=1", "traffic.prompt=100"],
    "no price": ["slice=rtx-4090:2", "traffic.arrival.rate_per_s=1"],
    "owned": ["prices.term=owned"],
    "seeds": ["run.seeds=3"],
    "few": ["traffic.n_requests=5"],
    "no limits": ["slo={}"],
    "speculation": ['engine.speculation={method="ngram", num_speculative_tokens=3, acceptance_rate=0.6}'],
    "prefix cache": [
        "engine.prefix_cache=blocks",
        "traffic.arrival.rate_per_s=0.3",
        "traffic.sessions={turns=3, turn_gap_s=20.0, shared_tokens=1000, opening=3000}",
    ],
}
"""Runs that lack something, or have something more."""


@pytest.fixture(scope="module")
def plans():
    """A plan on three chips, one of which has no price and one too little memory; and one that no fleet keeps."""
    scenario = load_scenario("llama-3-8b-azure-chat")
    options = PlanOptions(
        requests=300,
        batch_limits=(64,),
        token_budgets=(2048,),
        max_chips=1,
        front=(0.7, 1.0, 2.0),
        look_elsewhere=False,
        peak_to_mean=1.5,
        spare_replicas=1,
    )

    def made(targets, chips):
        return plan(
            scenario.model, scenario.traffic, targets, 200.0, chips, options=options, template=scenario, workers=1
        )

    asked = targets_of(scenario.slo)
    return {
        "feasible": made(asked, ("h100-sxm", "rtx-pro-6000", "l4", "rtx-4090")),
        "infeasible": made(asked.scaled(0.001), ("h100-sxm",)),
    }


@pytest.fixture(scope="module")
def studied():
    return study(load_lifetime("sardana-13b"), workers=1, progress=lambda _: None)


@pytest.fixture(scope="module")
def pages(runs, plans, studied):
    """A page of every kind."""
    made = {name: run_page(run) for name, run in runs.items()}
    made |= {name: plan_page(found) for name, found in plans.items()}
    made["lifetime"] = lifetime_page(studied)
    made["comparison"] = comparison_page([("a", runs["h100"]), ("b", runs["h200"]), ("c", runs["overloaded"])])
    made["joined"] = joined_pages(
        [made["h100"], made["overloaded"], made["feasible"], made["feasible"], made["lifetime"]]
    )
    return made


KINDS = ["h100", "overloaded", "feasible", "infeasible", "lifetime", "comparison", "joined"]


def whole_and_self_contained(page):
    text = page_html(page)
    read = checked(text)
    outside = [target for target in read.wanted if not target.startswith(("#", "data:,"))]
    assert outside == []
    assert "url(http" not in text
    assert "@import" not in text
    assert len(text.encode()) < 3e6
    assert len(set(read.ids)) == len(read.ids)
    local = {target[1:] for target in read.wanted if target.startswith("#") and len(target) > 1}
    assert local <= set(read.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(read.ids)
    words = " ".join(" ".join(read.text).split())
    slip = re.search(r".{0,60}(\bNone\b(?!:)|\bnan\b|\binf\b|\{|ttft_s|tpot_s|e2e_s|<=).{0,60}", words)
    assert slip is None, slip[0]
    return words


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_whole_and_self_contained(pages, kind):
    whole_and_self_contained(pages[kind])


@pytest.mark.parametrize("case", CASES)
def test_page_of_runs_that_lack_something(case):
    result = run_scenario(load_scenario("llama-3-8b-azure-chat", ["traffic.n_requests=300", *CASES[case]])).result
    words = whole_and_self_contained(run_page(result))
    s = result.summary
    assert ("cost per query" in words) == (s.prices is not None)
    assert ("TPOT, median" in words) == (s.latency.tpot_s.p50.value is not None)
    assert ("owning a chip" in words) == (case == "owned")
    assert ("Between seeds: the mean of 3 seeds" in words) == (case == "seeds")
    if s.energy:
        assert f"grade {s.energy.grade}" in words
        assert number(s.energy.facility_joules_per_query) in words
    comparison = comparison_page([("a", result), ("b", result)])
    whole_and_self_contained(comparison)


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


def test_page_of_a_plan_shows_the_record_s_figures(plans):
    found = plans["feasible"]
    best = found.best
    words = " ".join(" ".join(checked(page_html(plan_page(found))).text).split())
    for shown in (
        f"{best.chips:,}",
        usd(best.usd_per_hour),
        usd(best.usd_per_query),
        number(best.chip_seconds_per_query),
        seconds(found.verification.latency.tpot_s.p99.value),
        number(found.consumption.joules_per_query),
        *(step.name for step in found.waterfall),
        *(outcome.reason for outcome in found.by_chip if outcome.status == "does_not_fit"),
    ):
        assert shown in words
    assert {outcome.chip for outcome in found.by_chip} == {"h100-sxm", "rtx-pro-6000", "l4", "rtx-4090"}
    for outcome in found.by_chip:
        assert outcome.chip in words
    for assumption in found.assumptions:
        assert assumption.what in words


def test_waterfall_of_a_plan_ends_at_the_fleet(plans):
    (section,) = (section for section in plan_page(plans["feasible"]).sections if section.key == "waterfall")
    (bars,) = (block for block in section.blocks if isinstance(block, Bars))
    assert bars.bars[-1].stop == 1.0
    assert bars.bars[0].stop == pytest.approx(1 / plans["feasible"].total_factor)
    for before, after in zip(bars.bars[1:-1], bars.bars[2:-1], strict=False):
        assert after.start == pytest.approx(before.stop)


def test_infeasible_plan_says_how_far_off_and_what_is_near(plans):
    found = plans["infeasible"]
    page = plan_page(found)
    words = " ".join(checked(page_html(page)).text)
    assert (page.status, page.tone) == ("infeasible", "bad")
    for near in found.nearest:
        assert f"{near.fleet.chips:,} chips" in words
    (bars,) = (block for section in page.sections for block in section.blocks if isinstance(block, Bars))
    limits = {target.metric.removesuffix("_s").upper(): target.limit_s for target in found.targets.limits}
    for bar in bars.bars:
        assert bar.text.endswith(f"of {seconds(limits[bar.label])}")
        assert (bar.stop > bars.limit) == (found.idle_latency_s[f"{bar.label.lower()}_s"] > limits[bar.label])


def test_fleet_for_other_rates_contains_the_plan_itself(plans):
    found = plans["feasible"]
    rows = scaled_rows(found, found.best)
    own = next(row for row in rows if row[0] == "200")
    assert own[1:] == (f"{found.best.replicas:,}", f"{found.best.chips:,}", usd(found.best.usd_per_hour))
    chips = [int(row[2].replace(",", "")) for row in rows]
    assert chips == sorted(chips)
    assert chips[0] == (1 + found.provisioning.spare_replicas) * found.best.pools[0].chips_per_replica


def test_parts_of_a_joined_page_are_those_pages(pages):
    joined = pages["joined"]
    assert [section.title for section in joined.sections if section.part] == [
        pages[kind].title for kind in ("h100", "overloaded", "feasible", "feasible", "lifetime")
    ]
    drawn = [block for section in joined.sections for block in section.blocks if isinstance(block, Picture)]
    assert len({str(picture.svg) for picture in drawn}) == len(drawn)


def test_intervals_of_sampling_and_of_parameters_are_told_apart(runs):
    drawn = ParameterInterval(
        value=0.04, low=0.03, median=0.045, high=None, reason="no steady state", shares={"kernels": 0.25}
    )
    sure = drawn.model_copy(update={"low": 0.2, "high": 0.3, "shares": {}})
    intervals = Intervals(
        level=0.8,
        draws=64,
        draws_per_source=16,
        sources=["kernels", "residual"],
        overloaded_fraction=0.125,
        infeasible_fraction=0.0,
        figures={"latency.ttft_s.p50": drawn, "load.load": sure},
        notes=["traffic is taken as it stands"],
    )

    def with_intervals(found):
        result = runs["h100"]
        return replace(result, summary=result.summary.model_copy(update={"intervals": found}))

    page = run_page(with_intervals(intervals))
    words = whole_and_self_contained(page)
    (card,) = (card for card in page.cards if card.label == "TTFT, median")
    assert "parameters, 80 %: [30 ms … ∞]" in card.notes
    assert any(note.startswith("sampling, 95 %") for note in card.notes)
    (table,) = (b for section in page.sections if section.key == "sure" for b in section.blocks if isinstance(b, Grid))
    row = dict(zip(table.columns, next(row for row in table.rows if row[0] == "TTFT p50"), strict=True))
    assert row["parameters, 80 %"] == "[30 ms … ∞]"
    assert (row["from kernels"], row["from residual"]) == ("25 %", "–")
    assert "12.5 % of them have no steady state" in words
    moved = intervals.model_copy(update={"figures": {"load.load": sure.model_copy(update={"low": 0.5, "high": 0.6})}})
    compared = comparison_page([("a", with_intervals(intervals)), ("b", with_intervals(moved))])
    assert "[0.500 … 0.600] apart" in whole_and_self_contained(compared)


def test_page_of_a_fleet_shows_its_pools_links_and_agents():
    sets = ["agents.count=3", "agents.turns=2", "traffic.n_requests=60"]
    result = run_scenario(load_scenario("web-agent-fleet", sets)).result
    words = whole_and_self_contained(run_page(result))
    s = result.summary
    assert len(s.pools) == 2
    for pool in s.pools:
        assert pool.name in words
        assert pool.deployment.slice in words
    for link in s.links:
        assert f"{link.transfers:,}" in words
    assert f"{s.agents.completed:,} (" in words
    assert "fleets of these pools" in words


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


def test_command(run_cli, runs, plans, studied, tmp_path):
    for key in ("h100", "h200"):
        write_result(runs[key], tmp_path / key)
    write_plan(plans["infeasible"], tmp_path / "plan.json")
    write_lifetime(studied, tmp_path / "study.json")
    page = tmp_path / "page.html"

    def reported(*names, code=0):
        done = run_cli("report", *(str(tmp_path / name) for name in names), "--out", str(page), code=code)
        return done.stderr if code else page.read_text(encoding="utf-8")

    assert "roofline of a decode step" in reported("h100")
    assert "Settings that differ" in reported("h100", "h200")
    assert "nearest that is feasible" in reported("plan.json")
    assert "What a wrong forecast costs" in reported("study.json")
    every = reported("study.json", "h100", "plan.json", "h200")
    for part in ("Settings that differ", "nearest that is feasible", "What a wrong forecast costs"):
        assert part in every
    write_plan(plans["infeasible"], tmp_path / "again.json")
    twice = reported("plan.json", "again.json")
    assert "(plan.json)</h2>" in twice
    assert "(again.json)</h2>" in twice
    before = page.read_bytes()
    assert "twice" in reported("h100", "h100", code=2)
    assert "no such result folder" in reported("nothing", code=2)
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    assert "neither a plan nor a lifetime study" in reported("other.json", code=2)
    damaged = (tmp_path / "plan.json").read_text(encoding="utf-8").replace('"searched"', '"search"')
    (tmp_path / "plan.json").write_text(damaged, encoding="utf-8")
    assert "damaged plan" in reported("plan.json", code=2)
    assert page.read_bytes() == before


def test_browser_opens_the_pages_without_errors(pages, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra 'browser'")
    said = []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for kind in KINDS:
            path = tmp_path / f"{kind}.html"
            write_page(pages[kind], path)
            for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
                tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                tab.on("console", lambda message: said.append(message.text))
                tab.on("pageerror", lambda error: said.append(str(error)))
                tab.on(
                    "request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url)
                )
                tab.goto(path.as_uri())
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{kind} scrolls sideways"
                before = tab.evaluate("getComputedStyle(document.body).backgroundColor")
                tab.click("#theme")
                assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != before
                tab.close()
            plain = chromium.new_page(java_script_enabled=False)
            plain.goto(path.as_uri())
            for section in pages[kind].sections:
                assert section.title in plain.inner_text("main")
            plain.emulate_media(media="print")
            assert plain.evaluate(
                "[...document.querySelectorAll('.scroll')].every(s => s.scrollWidth <= s.clientWidth + 1)"
            )
            plain.close()
        chromium.close()
    assert said == []
