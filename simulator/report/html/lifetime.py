"""The page of a lifetime study: the answer, cost against size, and what a wrong forecast costs."""

from functools import partial
from typing import TYPE_CHECKING

from simulator.report.figures import compact
from simulator.report.forms import number, percent, usd
from simulator.report.html.inline import inline_svg
from simulator.report.html.inputs import input_blocks
from simulator.report.html.page import Block, Card, Grid, Page, Picture, Prose, Section
from simulator.report.lifetime_plot import draw_costs, draw_regret
from simulator.report.lifetime_tables import billions, choice_rows, money, size_rows, thinned, tokens, verdict
from simulator.results.lifetime import Lifetime, Optimum

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def lifetime_page(result: Lifetime) -> Page:
    """Page of a study."""
    served = [optimum for optimum in result.optima if optimum.best is not None]
    first = served[0]
    sections = [Section("costs", "Cost against size", _cost_blocks(result))]
    sections += [
        Section(f"optimum-{i}", _title(optimum), _optimum_blocks(optimum, key=f"o{i}"))
        for i, optimum in enumerate(result.optima)
    ]
    sections.append(Section("inputs", "What this rests on", input_blocks(result.warnings, result.assumptions)))
    return Page(
        title=result.scenario,
        lead=(
            *((result.description,) if result.description else ()),
            f"Quality: {result.quality}; loss {result.loss:.5g} by the law {result.law}.",
            *(verdict(first) if len(result.optima) == 1 else ()),
        ),
        cards=_cards(first) if len(result.optima) == 1 else _cards_of_limits(result.optima),
        sections=tuple(sections),
        footer=tuple(f"Source: {source}." for source in result.sources),
    )


def _title(optimum: Optimum) -> str:
    if optimum.slo_limit_s is None:
        return "What a wrong forecast costs"
    return f"E2E within {optimum.slo_limit_s:g} s"


def _cards(optimum: Optimum) -> tuple[Card, ...]:
    best = optimum.best
    if best is None:
        return ()
    chip_s = () if best.chip_s_per_query is None else (f"{number(best.chip_s_per_query)} chip-seconds",)
    cards = [
        Card("parameters", billions(best.parameters), (f"on {tokens(best.tokens)} tokens",)),
        Card(
            "cost over the life",
            money(best.total_usd),
            (f"training {money(best.training_usd)}", f"serving {money(best.serving_usd)}"),
        ),
        Card("cost of a query", usd(best.usd_per_query), chip_s),
    ]
    if optimum.saving is not None and optimum.chinchilla is not None:
        compute_optimal = f"{billions(optimum.chinchilla.parameters)} on {tokens(optimum.chinchilla.tokens)}"
        cards.append(Card("saved against compute-optimal", percent(optimum.saving), (compute_optimal,), "good"))
    if optimum.justified_demand is not None:
        note = "at which the model that sets the quality is the optimum"
        cards.append(Card("demand ÷ forecast", number(optimum.justified_demand), (note,)))
    return tuple(cards)


def _cards_of_limits(optima: list[Optimum]) -> tuple[Card, ...]:
    return tuple(
        Card(f"E2E within {o.slo_limit_s:g} s", "none", ("no size can be served",), "bad")
        if o.best is None
        else Card(
            f"E2E within {o.slo_limit_s:g} s",
            billions(o.best.parameters),
            (f"on {tokens(o.best.tokens)} tokens", f"{money(o.best.total_usd)} over the life"),
        )
        for o in optima
    )


def _drawn(draw: "Callable[[Axes], None]") -> "Figure":
    figure, axes = compact()
    draw(axes)
    return figure


def _cost_blocks(result: Lifetime) -> tuple[Block, ...]:
    svg = inline_svg(
        partial(_drawn, partial(draw_costs, optima=result.optima)), label="cost over the life against size", key="costs"
    )
    words = (
        f"Training: {result.training}.",
        f"Serving: {result.serving}.",
        f"Demand: {number(result.queries)} queries over {result.years:g} years, from {number(result.queries_per_s)} per second.",
    )
    pictures = [Picture(svg, "cost of training and serving over the life, against the number of parameters")]
    if len(result.optima) == 1:
        pictures.append(_regret_picture(result.optima[0], "regret"))
    return (Prose(words), *pictures)


def _regret_picture(optimum: Optimum, key: str) -> Picture:
    svg = inline_svg(
        partial(_drawn, partial(draw_regret, optimum=optimum)), label="cost of a choice under each demand", key=key
    )
    return Picture(svg, "cost of a choice ÷ the least possible, if demand is not what was forecast")


def _optimum_blocks(optimum: Optimum, *, key: str) -> tuple[Block, ...]:
    blocks: list[Block] = []
    if optimum.slo_limit_s is not None:
        blocks.append(Prose(tuple(verdict(optimum))))
    if optimum.best is not None:
        if optimum.slo_limit_s is not None:
            blocks.append(_regret_picture(optimum, f"{key}-regret"))
        columns, rows = choice_rows(optimum)
        worst = min(range(len(optimum.choices)), key=lambda i: optimum.choices[i].worst_regret)
        caption = "cost of a choice ÷ least possible, when demand is so many times the forecast"
        blocks.append(Grid(columns, tuple(rows), caption=caption, marked=frozenset({worst})))
        shown = thinned(optimum.sizes, 17)
        columns, rows = size_rows(shown)
        best = shown.index(optimum.best)
        keep = [i for i, column in enumerate(columns) if any(row[i] not in {"", "–"} for row in rows)]
        blocks.append(
            Grid(
                tuple(columns[i] for i in keep),
                tuple(tuple(row[i] for i in keep) for row in rows),
                caption="sizes that reach the quality; the cheapest is marked",
                marked=frozenset({best}),
            )
        )
    if optimum.refused:
        rows = [(billions(r.parameters), r.reason) for r in optimum.refused]
        blocks.append(Grid(("parameters", "why it cannot be served"), tuple(rows), left=2))
    return tuple(blocks)
