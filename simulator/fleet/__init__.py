"""Room: many replicas. Pools, routers, links that carry KV caches, and agents that wait for answers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from simulator.fleet.records import Agents, Fleet, Link, Pool, PoolResult, Router, Served

if TYPE_CHECKING:
    from simulator.fleet.agents import serve_agents
    from simulator.fleet.open_loop import serve

__all__ = ["Agents", "Fleet", "Link", "Pool", "PoolResult", "Router", "Served", "serve", "serve_agents"]


def __getattr__(name: str) -> Any:
    # Describing a fleet needs no engine, and so no Numba.
    if name in {"serve", "serve_agents"}:
        where = "open_loop" if name == "serve" else "agents"
        return getattr(import_module(f"simulator.fleet.{where}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
