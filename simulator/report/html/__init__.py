"""Self-contained HTML pages of results: no network, light and dark, readable on paper and without scripts."""

from simulator.report.html.comparison import comparison_page
from simulator.report.html.joined import joined_pages
from simulator.report.html.lifetime import lifetime_page
from simulator.report.html.page import Page, page_html, write_page
from simulator.report.html.plan import plan_page
from simulator.report.html.run import run_page

__all__ = [
    "Page",
    "comparison_page",
    "joined_pages",
    "lifetime_page",
    "page_html",
    "plan_page",
    "run_page",
    "write_page",
]
