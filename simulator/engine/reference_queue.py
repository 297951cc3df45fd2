"""The queue of the reference engine: who is served next, and who is preempted (rules Q1 to Q4).

Written from docs/engine-scheduling.md to be read: the first of the queue is a minimum over everybody in it.
"""

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING

from simulator.engine.scheduling import Scheduling

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from simulator.engine.reference_state import Request

Key = tuple[float, ...]


@dataclass
class Queue:
    """Requests that wait, under one of the policies."""

    scheduling: Scheduling
    requests: "list[Request]" = field(default_factory=list)
    tickets: int = 0
    """Tickets given out."""
    preempted: int = 0
    """Requests put back so far."""
    counts: dict[int, int] = field(default_factory=dict)
    """What each tenant was served (Q4)."""
    last_tenant: int | None = None

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self.requests)

    def __iter__(self) -> "Iterator[Request]":
        """Go through the queue in the order of service as it is now."""
        return iter(sorted(self.requests, key=self.key))

    def key(self, request: "Request") -> Key:
        """What the queue is ordered by (Q1)."""
        if self.scheduling.policy == "fcfs":
            came_back = request.returned_s < inf  # F5
            return (-request.put_back, request.returned_s, request.row if came_back else request.ticket)
        if self.scheduling.policy == "fair":
            return (self.counts[request.tenant], request.tenant, -request.put_back, request.ticket)
        return (request.order, request.ticket)

    def join(self, request: "Request") -> None:
        """Let an attempt join, with a ticket; a tenant of whom nobody waits is lifted (Q4)."""
        request.ticket = self.tickets
        request.put_back = 0
        self.tickets += 1
        if self.scheduling.policy == "fair":
            count = self.counts.setdefault(request.tenant, 0)
            tenants = {other.tenant for other in self.requests}
            if request.tenant not in tenants:
                if tenants:
                    count = max(count, min(self.counts[tenant] for tenant in tenants))
                elif self.last_tenant is not None:
                    count = max(count, self.counts[self.last_tenant])
                self.counts[request.tenant] = count
        self.requests.append(request)

    def join_again(self, request: "Request") -> None:
        """Let a preempted request wait again; the last one is the first of its queue under ``fcfs`` and ``fair``."""
        self.preempted += 1
        request.put_back = self.preempted
        self.requests.append(request)

    def come_back(self, request: "Request") -> None:
        """Let a request wait again that has loaded (F5, M11): no ticket and no lift (M9)."""
        self.requests.append(request)

    def first(self) -> "Request":
        """Who is served next."""
        return min(self.requests, key=self.key)

    def take(self, request: "Request", start: int, *, is_new: bool) -> None:
        """Take a request out that is admitted, and count its prompt from ``start`` on if it is the attempt's first time (Q4, M9)."""
        self.requests.remove(request)
        if self.scheduling.policy == "fair":
            self.last_tenant = request.tenant
            if is_new:
                self.counts[request.tenant] += self.scheduling.prompt_weight * (request.prompt_tokens - start)

    def leave(self, request: "Request") -> None:
        """Let a request go whose client has left, or which loads."""
        self.requests.remove(request)

    def count_output(self, request: "Request") -> None:
        """Count a token that will be emitted, or the tokens of a pass (Q4, M9)."""
        if self.scheduling.policy == "fair":
            self.counts[request.tenant] += self.scheduling.output_weight

    def victim(self, running: "Sequence[Request]") -> "Request":
        """Who of ``running`` is preempted when blocks are short (Q2)."""
        if self.scheduling.policy in {"fcfs", "fair"}:
            return running[-1]
        return max(running, key=self.key)

    def foremost(self, running: "Sequence[Request]") -> "Request":
        """Who of ``running`` is preempted last (Q2)."""
        if self.scheduling.policy in {"fcfs", "fair"}:
            return running[0]
        return min(running, key=self.key)

    def lower_victim(self, first: "Request", running: "Sequence[Request]") -> "Request | None":
        """Who is preempted for the first of the queue: nobody, unless of a lower class (Q3)."""
        if not self.scheduling.preempt_lower or not running:
            return None
        victim = self.victim(running)
        return victim if victim.order > first.order else None
