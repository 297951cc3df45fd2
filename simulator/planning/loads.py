"""A traffic at any rate: the stream that every simulation of a plan is fed from."""

from pathlib import Path
from threading import Lock

from simulator.engine.records import Requests
from simulator.errors import InputError
from simulator.planning.rating import Load
from simulator.run.scenario import Scenario
from simulator.run.serving import scenario_requests
from simulator.traffic import Stream, TrafficSpec, build_stream
from simulator.traffic.arrivals import Closed, Constant, Gamma, Offline, Poisson, TraceTimes
from simulator.traffic.spec import resolve as resolve_traffic

#: Requests of one simulation at most.
MOST_REQUESTS = 500_000


class Loads:
    """Streams of a scenario's traffic, as long as they are needed; a longer one begins with the shorter one.

    Raises
    ------
    InputError
        If the traffic has no rate of its own that could be scaled: closed loops, batches, sessions.
    """

    def __init__(self, template: Scenario, seed: int, at_least: int) -> None:
        spec = resolve_traffic(template.traffic, base_folder=Path.cwd())
        if spec.sessions is not None:
            raise InputError(
                f"{template.name}: traffic.sessions: a plan scales the rate of independent requests, and the turns of a session "
                "follow one another at times of their own; state prompt, output and cached_tokens of a turn instead"
            )
        if isinstance(spec.arrival, Closed | Offline):
            raise InputError(
                f"{template.name}: traffic.arrival.process = {spec.arrival.process!r}: a plan needs arrivals with a rate: "
                "poisson, gamma, constant, or the times of a trace"
            )
        self.spec = spec
        self.source = ""
        self._template = template
        self._seed = seed
        self._lock = Lock()
        self._longest = self._build(at_least)

    def first(self, n: int) -> Load:
        """The first ``n`` requests; of a trace, all it has."""
        if self.spec.trace is not None:
            return self._longest
        with self._lock:
            have = len(self._longest.requests)
            if n > have:
                self._longest = self._build(min(MOST_REQUESTS, max(n, 2 * have)))
            return self._longest.first(min(n, MOST_REQUESTS))

    @property
    def shortest_tokens(self) -> int:
        """KV-cache tokens of the shortest request at its end."""
        requests = self._longest.requests
        return int((requests.prompt_tokens + requests.output_tokens).min()) - 1

    @property
    def mean_tokens(self) -> float:
        """Mean KV-cache tokens of a request at its end."""
        requests = self._longest.requests
        return float((requests.prompt_tokens + requests.output_tokens).mean()) - 1

    def _build(self, n: int) -> Load:
        spec = self.spec
        if spec.trace is None:
            spec = spec.model_copy(update={"n_requests": n, "duration_s": None})
        stream = build_stream(spec, self._seed, base_folder=Path.cwd())
        self.source = stream.source
        options = self._template.run
        return Load(
            requests=self._requests(stream),
            rate_per_s=mean_rate_per_s(spec, stream),
            warm_up_fraction=options.warm_up_fraction,
            drain_fraction=options.drain_fraction,
        )

    def _requests(self, stream: Stream) -> Requests:
        if len(stream) < 2 or float(stream.arrival_s[-1]) <= float(stream.arrival_s[0]):
            raise InputError(f"{self._template.name}: every request arrives at once, so there is no rate to plan for")
        return scenario_requests(self._template, stream, self._seed)


def mean_rate_per_s(spec: TrafficSpec, stream: Stream) -> float:
    """Rate that the arrival process states, or that of a trace's times. [1/s]"""
    if isinstance(spec.arrival, Poisson | Gamma | Constant):
        return spec.arrival.rate_per_s
    return (len(stream) - 1) / float(stream.arrival_s[-1] - stream.arrival_s[0])


def at_rate(spec: TrafficSpec, load: Load, rate_per_s: float, n_requests: int) -> TrafficSpec:
    """The traffic of one replica at a rate, of which ``load`` is made; of a trace, all its requests. [1/s]"""
    arrival = spec.arrival
    if arrival is None or isinstance(arrival, TraceTimes):
        scale = getattr(arrival, "rate_scale", 1.0) * rate_per_s / load.rate_per_s
        found: TraceTimes | Poisson | Gamma | Constant = TraceTimes(rate_scale=scale)
    elif isinstance(arrival, Poisson | Gamma | Constant):
        found = arrival.model_copy(update={"rate_per_s": rate_per_s})
    else:
        raise InputError(f"traffic.arrival.process = {arrival.process!r} has no rate")
    n = len(load.requests) if spec.trace is not None else n_requests
    return spec.model_copy(update={"arrival": found, "n_requests": n, "duration_s": None})
