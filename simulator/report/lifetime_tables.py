"""A lifetime study as text for people."""

from simulator.report.forms import aligned, number, percent, usd, wrapped
from simulator.report.tables import by_grade
from simulator.results.lifetime import Lifetime, Optimum, Size


def billions(parameters: float) -> str:
    """A number of parameters.

    >>> billions(8.03e9), billions(4.05e11)
    ('8.03B', '405B')
    """
    return f"{number(parameters / 1e9)}B"


def tokens(count: float) -> str:
    """A number of tokens.

    >>> tokens(3.302e12), tokens(8.5e10)
    ('3.30T', '85.0B')
    """
    return f"{number(count / 1e12)}T" if count >= 1e12 else f"{number(count / 1e9)}B"


def money(value: float) -> str:
    """Dollars, large amounts in millions or billions.

    >>> money(1_425_060), money(2.5e9), money(950.0)
    ('$1.43M', '$2.50bn', '$950')
    """
    if abs(value) >= 1e9:
        return f"${number(value / 1e9)}bn"
    return f"${number(value / 1e6)}M" if abs(value) >= 1e6 else usd(value)


def lifetime_text(result: Lifetime) -> str:
    """The study, grouped for reading."""
    lines = [
        f"{result.scenario} · {result.quality} · law {result.law}, loss {result.loss:.5g}",
        *wrapped(f"training: {result.training}"),
        *wrapped(f"serving: {result.serving}"),
        *wrapped(
            f"demand: {number(result.queries)} queries over {result.years:g} years, from {number(result.queries_per_s)} per second"
        ),
    ]
    for optimum in result.optima:
        lines += ["", *_optimum(optimum)]
    if result.warnings:
        lines += ["", "Warnings"]
        for warning in result.warnings:
            lines += wrapped(warning, first="  ! ")
    if result.assumptions:
        rows = [[a.what, a.kind, a.value, a.source.partition(",")[0]] for a in by_grade(result.assumptions)]
        lines += ["", "Inputs behind these figures, weakest first", *aligned(rows, left=4)]
    return "\n".join(lines) + "\n"


def verdict(optimum: Optimum) -> list[str]:
    """What the study answers, in sentences."""
    best, chinchilla = optimum.best, optimum.chinchilla
    if best is None:
        return ["No size that reaches the quality can be served within the limit."]
    answer = (
        f"{billions(best.parameters)} parameters trained on {tokens(best.tokens)} tokens cost least: {money(best.training_usd)} of "
        f"training and {money(best.serving_usd)} of serving, {money(best.total_usd)} together."
    )
    found = [answer]
    if best.deployment:
        found.append(f"Served on {best.deployment}.")
    if chinchilla is not None and optimum.saving is not None and best.parameters != chinchilla.parameters:
        found.append(
            f"The compute-optimal {billions(chinchilla.parameters)} on {tokens(chinchilla.tokens)} would cost "
            f"{money(chinchilla.total_usd)}: the optimum saves {percent(optimum.saving)}."
        )
    elif chinchilla is None:
        found.append("The compute-optimal size cannot be served within the limit.")
    if optimum.justified_demand is not None:
        found.append(
            f"The model that sets the quality is itself the optimum at {number(optimum.justified_demand)} times this demand."
        )
    if optimum.elastic is not None:
        found.append(
            f"If demand follows the cost of a query, {billions(optimum.elastic.parameters)} is the optimum, at "
            f"{number(optimum.elastic_demand)} times the demand. Added demand has a value that a comparison of costs leaves out."
        )
    return found


def size_rows(sizes: list[Size]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a table of sizes."""
    columns = ("parameters", "tokens", "training", "serving", "together", "per query", "chip-s/query", "served on")
    rows: list[tuple[str, ...]] = [
        (
            billions(s.parameters),
            tokens(s.tokens),
            money(s.training_usd),
            money(s.serving_usd),
            money(s.total_usd),
            usd(s.usd_per_query),
            number(s.chip_s_per_query),
            s.deployment,
        )
        for s in sizes
    ]
    return columns, rows


def choice_rows(optimum: Optimum) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the regret table."""
    columns = (
        "choice",
        "parameters",
        "tokens",
        *(f"×{row.times:.3g}" for row in optimum.forecasts),
        "worst",
        "expected",
    )
    rows = [
        (
            c.reason,
            billions(c.parameters),
            tokens(c.tokens),
            *(f"{regret:.3f}" for regret in c.regret),
            f"{c.worst_regret:.3f}",
            "–" if c.expected_usd is None else money(c.expected_usd),
        )
        for c in optimum.choices
    ]
    return columns, rows


def thinned(sizes: list[Size], most: int) -> list[Size]:
    """So many sizes at most, evenly spread, the cheapest and both ends among them."""
    if len(sizes) <= most:
        return sizes
    best = min(range(len(sizes)), key=lambda i: sizes[i].total_usd)
    kept = {round(i * (len(sizes) - 1) / (most - 1)) for i in range(most)} | {best}
    return [sizes[i] for i in sorted(kept)]


def _optimum(optimum: Optimum) -> list[str]:
    title = "Answer" if optimum.slo_limit_s is None else f"E2E within {optimum.slo_limit_s:g} s"
    lines = [title, *(line for sentence in verdict(optimum) for line in wrapped(sentence))]
    if optimum.best is None:
        return lines + [line for r in optimum.refused[:3] for line in wrapped(f"{billions(r.parameters)}: {r.reason}")]
    columns, rows = size_rows(thinned(optimum.sizes, 9))
    shown = [i for i, name in enumerate(columns) if name != "served on" and any(row[i] != "–" for row in rows)]
    lines += ["", *aligned([[row[i] for i in shown] for row in (columns, *rows)], left=1)]
    columns, rows = choice_rows(optimum)
    lines += [
        "",
        "If demand turns out to be … times the forecast: cost of a choice ÷ least possible",
        *aligned([list(columns), *map(list, rows)], left=1),
    ]
    if optimum.identity is not None:
        lines += wrapped(
            f"optimality identity {optimum.identity:.4f} (1 at an optimum inside a smooth piece), serving cost rises as "
            f"N^{number(optimum.elasticity_of_serving)}"
        )
    return lines
