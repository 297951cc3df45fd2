"""What a scenario says about fleets: ``[router]``, ``[[pool]]``, ``[link]``, ``[store]`` and ``[agents]``."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from simulator.catalog.records import Record
from simulator.engine.block_hashes import BlockHashes
from simulator.engine.records import Requests
from simulator.errors import UnpriceableError, nearest
from simulator.fleet.records import POLICIES, Agents, Link, Role, Router
from simulator.randomness import draw
from simulator.traffic.arrivals import Closed
from simulator.traffic.lengths import Fixed, Length
from simulator.traffic.sessions import growing_blocks
from simulator.traffic.stream import MAX_TOKENS_PER_REQUEST

if TYPE_CHECKING:
    from simulator.catalog.slices import Slice

Ints = NDArray[np.int64]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

#: Tables of a scenario that a pool may state anew, field by field.
TABLES = ("sharding", "deployment", "engine", "efficiency")
#: What else a pool may state anew.
VALUES = ("slice", "precision")


class RouterOptions(Record):
    """``[router]``: who chooses a replica. ``router = "least-requests"`` is short for its ``policy``."""

    policy: str = Router.policy
    """``round-robin``, ``random``, ``hash``, ``least-requests``, ``least-kv``, ``power-of-two`` or ``prefix-affinity``."""
    decode: str = "least-kv"
    """The same for decode pools, when a prefill has ended; all but ``prefix-affinity``."""
    prefix_tokens: Annotated[int, Field(ge=0)] = Router.prefix_tokens
    """With ``hash``, where there are no tenants: requests with the same prompt up to here and a block further go together."""
    match_fraction: Share = Router.match_fraction
    """With ``prefix-affinity``: share of a prompt's blocks that a replica must have been sent for the request to go there …"""
    imbalance: Annotated[int, Field(ge=0)] = Router.imbalance
    """… unless some replica has more requests than another by more than this …"""
    imbalance_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Router.imbalance_ratio
    """… and by more than this factor."""

    @field_validator("policy", "decode")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in POLICIES:
            raise ValueError(f"no such router{nearest(name, POLICIES)}")
        return name

    @field_validator("decode")
    @classmethod
    def _no_prefixes_left(cls, name: str) -> str:
        if name == "prefix-affinity":
            raise ValueError("a decode replica is sent the whole KV cache; prefix-affinity is for where requests enter")
        return name

    @property
    def entry(self) -> Router:
        """Who chooses where requests enter."""
        return Router(self.policy, self.prefix_tokens, self.match_fraction, self.imbalance, self.imbalance_ratio)


class PoolOptions(Record):
    """One of ``[[pool]]``: equal replicas with a role. What is not stated is the scenario's own, field by field."""

    name: str
    role: Role = "unified"
    replicas: PositiveInt = 1
    slice: str | None = None
    precision: str | None = None
    sharding: dict[str, Any] = Field(default_factory=dict)
    deployment: dict[str, Any] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    efficiency: dict[str, Any] = Field(default_factory=dict)

    @field_validator("efficiency", mode="before")
    @classmethod
    def _word_is_base(cls, value: Any) -> Any:
        return {"base": value} if isinstance(value, str) else value


class StoreOptions(Record):
    """``[store]``: where the KV cache of every request's cached tokens is fetched from before its prefill."""

    bandwidth_bytes_per_s: PositiveFloat
    """Of each link."""
    latency_s: Seconds = 0.0
    per: Literal["fleet", "target"] = "fleet"
    """One link for all, or one to each replica."""

    @property
    def link(self) -> Link:
        """As the fleet takes it."""
        return Link(self.bandwidth_bytes_per_s, self.latency_s, self.per)


class LinkOptions(Record):
    """``[link]``: what carries KV caches from prefill to decode replicas."""

    bandwidth_bytes_per_s: PositiveFloat | None = None
    """Of each link; None: the network interfaces of a prefill replica's chips together."""
    latency_s: Seconds | None = None
    """None: that of the chips' network."""
    per: Literal["fleet", "source", "target", "both"] = "source"
    """One link for all; one for each replica that sends; that receives; or both, held together."""
    layerwise: bool = False
    """Whether layers are sent while later ones are computed."""
    first_token: Literal["prefill", "decode"] = "prefill"  # noqa: S105 - a token of text
    """Who gives the first token: the prefill replica, or the decode replica, which computes the last prompt token again."""

    def link(self, a_slice: "Slice") -> Link:
        """As the fleet takes it; ``a_slice`` is that of a prefill replica.

        Raises
        ------
        UnpriceableError
            If the chip's file does not state its network, and neither does the scenario.
        """
        bandwidth, latency = self.bandwidth_bytes_per_s, self.latency_s
        if bandwidth is None or latency is None:
            chip = a_slice.chip
            if chip.scale_out is None:
                raise UnpriceableError(
                    f"{chip.name}: scale_out is not published; state link.bandwidth_bytes_per_s and link.latency_s"
                )
            if bandwidth is None:
                one = chip.scale_out.bandwidth.si(f"{chip.name}: scale_out.bandwidth", "bytes/s")
                bandwidth = one * a_slice.n_chips
            if latency is None:
                latency = chip.scale_out.latency.si(f"{chip.name}: scale_out.latency", "s")
        return Link(bandwidth, latency, self.per, self.layerwise)


class AgentOptions(Record):
    """``[agents]``: requests are turns of tasks; the next turn follows when the answer has come."""

    count: PositiveInt
    """Agents at work at a time; task after task goes to whichever is free."""
    turns: Length = Fixed(tokens=1)
    """Turns of a task, by the same laws as lengths."""
    think_s: Seconds = 0.0
    """Mean time from an answer to the agent's next request: thinking, tool calls."""
    think_cv: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Its coefficient of variation, gamma distributed: 0 is constant, 1 exponential."""
    start_s: Seconds = 0.0
    """Agents start evenly spread over this time."""
    growing: bool = False
    """Whether a turn re-sends what was said before: ``traffic`` then says what it adds. With a ``[store]`` the rest is cached, and
    replicas with a prefix cache find it there."""
    opening: Length | None = None
    """What a task that grows brings along before its first turn: documents, code. [tokens]"""
    shared_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS_PER_REQUEST)] = 0
    """A prompt that growing tasks have in common, in front of everything. [tokens]"""
    block_tokens: PositiveInt = 16
    """Granularity at which a prefix cache may see what a growing task re-sends. [tokens]"""
    deadline_s: PositiveFloat | None = None
    """An agent leaves a task that it has not ended this long after its first request: it sends no more of it."""

    @model_validator(mode="after")
    def _fields_go_together(self) -> "AgentOptions":
        if 0 < self.think_cv < 0.01:
            raise ValueError(f"think_cv = {self.think_cv:g}: must be 0 (constant) or 0.01 … 100")
        for name in ("opening", "shared_tokens"):
            if getattr(self, name) and not self.growing:
                raise ValueError(f"{name}: only with growing = true; otherwise traffic states whole prompts")
        return self

    @property
    def in_words(self) -> str:
        """On one line."""
        stated = self.model_dump(exclude_none=True, exclude_defaults=True, exclude={"count"})
        if "turns" in stated:
            stated["turns"] = ", ".join(f"{value}" for value in self.turns.model_dump(exclude={"kind"}).values())
        return ", ".join([f"{self.count} agents", *(f"{name} = {value}" for name, value in stated.items())])

    @property
    def arrival(self) -> Closed:
        """The closed loop that the traffic is built for."""
        return Closed(concurrency=self.count)

    def agents(self, n: int, seed: int) -> Agents:
        """Tasks and think times of ``n`` requests; the last task may be cut short."""
        turns = self.turns.sample(seed, "agent_turns", 0, n)
        ends = np.cumsum(turns)
        tasks = int(np.searchsorted(ends, n)) + 1
        turns = turns[:tasks].copy()
        turns[-1] -= ends[tasks - 1] - n
        think = np.full(n, self.think_s)
        if self.think_s > 0 and self.think_cv > 0:
            shape = self.think_cv**-2
            law = draw(seed, "agent_think", 0, n, lambda rng, size: rng.standard_gamma(shape, size))
            think = law * (self.think_s / shape)
        # The first tasks go to the agents in order.
        firsts = np.concatenate([[0], np.cumsum(turns)])[: min(self.count, tasks)]
        think[firsts] = self.start_s * np.arange(len(firsts)) / self.count
        return Agents(self.count, turns, think, self.deadline_s or np.inf)


def growing_context(options: AgentOptions, agents: Agents, requests: Requests, seed: int) -> tuple[Requests, Ints]:
    """Turns that re-send the past, and how many of their tokens were there before. [tokens]

    ``requests`` have as prompts what each turn adds. Their hashes, if any, are taken off: they were of those prompts.
    """
    n_tasks = len(agents.turns)
    first = np.concatenate([[0], np.cumsum(agents.turns)])[:-1]
    task = np.repeat(np.arange(n_tasks), agents.turns)
    said = np.concatenate([[0], np.cumsum(requests.prompt_tokens + requests.output_tokens)])[:-1]
    start = np.full(n_tasks, options.shared_tokens)
    if options.opening is not None:
        start += options.opening.sample(seed, "agent_opening", 0, n_tasks)
    before = said - said[first][task] + start[task]
    prompt = before + requests.prompt_tokens
    before[first] = 0  # brought along, and computed by whoever has it first
    return replace(requests, prompt_tokens=prompt, hashes=None), before


def growing_hashes(options: AgentOptions, agents: Agents, requests: Requests) -> BlockHashes:
    """What a prefix cache, or a router that goes by prefixes, may know of tasks that grow; ``requests`` with whole prompts."""
    task = np.repeat(np.arange(len(agents.turns)), agents.turns)
    blocks = growing_blocks(
        task,
        requests.prompt_tokens,
        requests.output_tokens,
        block_tokens=options.block_tokens,
        shared_tokens=options.shared_tokens,
        shared=np.zeros(len(task), dtype=np.int64),
        field="agents.block_tokens",
    )
    return BlockHashes(**vars(blocks))
