"""What a replica cannot do at the same time, and why.

:data:`LASTING` holds for both engines: no server does it, or no rule says how (``docs/engine-mixtures.md``). :data:`PENDING` is what the compiled
engine does not do yet; the reference engine does.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from simulator.engine.records import EngineSettings, Requests
from simulator.engine.scheduling import HostOverheads
from simulator.errors import InputError
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost

QUEUE = ("policy", "batching", "chunk limits", "watermark", "host", "clients that leave")
"""Features beyond first come, first served."""
MEMORY = ("prefix cache", "swap", "tiers")
"""Features that remember blocks."""

NAMES = {
    "policy": "engine.policy",
    "batching": "engine.batching",
    "chunk limits": "engine.long_prefill_token_threshold and max_num_partial_prefills",
    "watermark": "engine.watermark",
    "host": "engine.host",
    "clients that leave": "[clients] timeouts and cancellations",
    "prefix cache": "engine.prefix_cache",
    "prefix tree": 'engine.prefix_cache = "radix"',
    "swap": 'engine.preemption = "swap"',
    "tiers": "engine.cache_tiers",
    "writing through": "write_through of engine.cache_tiers",
    "warm store": "stored_tokens of requests",
    "speculation": "engine.speculation",
    "uneven experts": "engine.expert_skew",
    "bounded windows": "engine.kv_groups with windowed layers",
    "ranks": "deployment.dp",
    "stages": "deployment.pp",
}
"""Every feature, and the setting that switches it on."""


class Refusal(NamedTuple):
    """Any of ``these`` with any of ``those``, and why not."""

    these: Sequence[str]
    those: Sequence[str]
    reason: str


LASTING = (
    Refusal(
        ("speculation",),
        ("stages",),
        "the next drafts need the last stage's verdict on the present ones; vLLM 0.19 does not compose the two either",
    ),
    Refusal(("ranks",), ("stages",), "a stage is priced as one rank"),
    Refusal(
        ("bounded windows",),
        ("prefix tree", "tiers"),
        "which blocks of a window remain to be found there is not modelled; engine.disable_hybrid_kv_cache_manager = true "
        "keeps the blocks of all layers alike",
    ),
)

PENDING: tuple[Refusal, ...] = ()


def features_of(cost: StepCost | PipelineCost, settings: EngineSettings, requests: Requests) -> frozenset[str]:
    """Names of what a run does beyond a plain replica's: keys of :data:`NAMES`."""
    scheduling, host = settings.scheduling, settings.host
    found = {
        "policy": scheduling.policy != "fcfs",
        "batching": scheduling.batching != "chunked",
        "chunk limits": scheduling.long_prefill_token_threshold > 0 or scheduling.max_num_partial_prefills > 0,
        "watermark": scheduling.watermark > 0,
        "host": host != HostOverheads(asynchronous=host.asynchronous),
        "clients that leave": requests.clients_may_leave,
        "prefix cache": settings.prefix_cache != "off",
        "prefix tree": settings.prefix_cache == "radix",
        "swap": settings.swap is not None,
        "tiers": bool(settings.tiers),
        "writing through": any(tier.write_through for tier in settings.tiers),
        "warm store": bool(settings.tiers) and requests.stored_tokens is not None,
        "speculation": settings.speculation is not None,
        "uneven experts": settings.expert_skew.on,
        "bounded windows": settings.kv_groups.windowed > 0,
        "ranks": isinstance(cost, StepCost) and cost.ranks > 1,
        "stages": isinstance(cost, PipelineCost) and len(cost.stages) > 1,
    }
    return frozenset(name for name, on in found.items() if on)


def why_not(features: frozenset[str], refusals: Sequence[Refusal]) -> str | None:
    """The first of ``refusals`` that ``features`` meet, as a sentence; None if they meet none."""
    for refusal in refusals:
        for one, other in product(refusal.these, refusal.those):
            if {one, other} <= features:
                return f"{NAMES[one]}: not together with {NAMES[other]}: {refusal.reason}"
    return None


def check_mixture(
    cost: StepCost | PipelineCost,
    settings: EngineSettings,
    requests: Requests,
    refusals: Sequence[Refusal] = (*LASTING, *PENDING),
) -> None:
    """Refuse what does not go together.

    Raises
    ------
    InputError
        Naming both settings.
    """
    sentence = why_not(features_of(cost, settings, requests), refusals)
    if sentence is not None:
        raise InputError(sentence)
