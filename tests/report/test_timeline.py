"""The timeline picture: what it sums, and that it draws every kind of run."""

import numpy as np
import pytest

from simulator.report.timeline import PANELS, draw_timeline, fleet_series
from simulator.run import load_scenario, run_scenario


def table(*replicas):
    """Timeline of replicas given as (interval, running per interval)."""
    columns = {"replica": [], "start_s": [], "interval_s": [], "running": []}
    for r, (interval, running) in enumerate(replicas):
        columns["replica"] += [r] * len(running)
        columns["start_s"] += [i * interval for i in range(len(running))]
        columns["interval_s"] += [interval] * len(running)
        columns["running"] += running
    return {name: np.array(values, dtype=float) for name, values in columns.items()}


def test_replicas_with_intervals_of_their_own_are_added_over_the_longest():
    found = table((1.0, [2, 4, 6, 8]), (2.0, [10, 20]))
    time, running = fleet_series(found, "running", adds=True)
    assert time.tolist() == [0, 2, 4]
    assert running.tolist() == [13, 27, 27]
    assert fleet_series(found, "running", adds=False)[1].tolist() == [6.5, 13.5, 13.5]
    assert [len(part) for part in fleet_series(table(), "running", adds=True)] == [0, 0]


@pytest.mark.parametrize(
    "changes",
    [
        ["replicas=2", "traffic.arrival.rate_per_s=30"],
        ["engine.num_gpu_blocks_override=3000", "traffic.arrival.rate_per_s=25"],
        ["run.summary_only=true"],
    ],
)
def test_every_run_can_be_drawn(changes):
    run = run_scenario(load_scenario("llama-3-8b-azure-chat", ["traffic.n_requests=600", *changes]))
    figure = draw_timeline(run.result)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [title for title, *_ in PANELS]
    lost = run.result.timeline["preemptions_per_s"] * run.result.timeline["interval_s"]
    assert lost.sum() == pytest.approx(run.summary.requests.preemptions)
    if "override" in changes[0]:
        assert run.summary.requests.preemptions > 10
