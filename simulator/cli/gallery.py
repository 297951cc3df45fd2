"""The gallery: pages and pictures of the shipped scenarios, each with the command lines that make it."""

import contextlib
import io
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from simulator.errors import InfeasibleError


@dataclass(frozen=True)
class Piece:
    """One file of the gallery. In ``steps``, ``{out}`` is the gallery's folder and ``{runs}`` one for results on the way."""

    file: str
    what: str
    steps: tuple[str, ...]


_70B = "--model llama-3-70b --precision w8a16kv8"

#: Steps that several pieces name are taken once.
_CHAT = "simulate llama-3-8b-azure-chat --out {runs}/chat --plot {out}/run.png"
_STUDY = "lifetime llama-3-8b-15t --out {runs}/lifetime.json --plot {out}/lifetime.png"
_CHAT_PLAN = (
    "plan llama-3-8b-azure-chat --qps 1000 --peak 2 --spare 1 --chips h100-sxm,l4,tpu-v5e "
    "--out {runs}/chat-plan.json --plot {out}/plan.png"
)
_TEXTBOOK = (
    "pareto --model llama-3-70b --precision w8a16kv8g0 --quantize-head --slice tpu-v5e:4x4 --efficiency textbook "
    "--max-num-seqs 512 --contexts 2k,8k,32k --plot {out}/pareto-textbook.png"
)
_SPECULATION = (
    "speculation --model llama-3-70b --slice h100-sxm:8 --method draft_model --draft-model llama-3-8b --tokens 4 "
    "--acceptance 0.8 --simulate --plot {out}/speculation.png"
)

GALLERY = (
    Piece(
        "chat.html",
        "Report of a run: Llama-3-8B on one H100, Azure conversations",
        (_CHAT, "report {runs}/chat --out {out}/chat.html"),
    ),
    Piece(
        "chips.html",
        "Two runs compared: the same on H100 and on H200",
        (
            _CHAT,
            "simulate llama-3-8b-azure-chat --set slice=h200-sxm:1 --out {runs}/chat-h200",
            "report {runs}/chat {runs}/chat-h200 --out {out}/chips.html",
        ),
    ),
    Piece(
        "web-agent.html",
        "Report of a run: a web agent on TPU v5e",
        ("simulate web-agent --out {runs}/web-agent", "report {runs}/web-agent --out {out}/web-agent.html"),
    ),
    Piece(
        "web-agent-plan.html",
        "Report of two plans: 10,000 web agents' queries per second within 0.75 s, and within 5 s",
        (
            "plan web-agent --qps 10000 --out {runs}/web-agent-plan.json",
            "plan web-agent --qps 10000 --e2e 5@50 --out {runs}/web-agent-plan-5s.json",
            "report {runs}/web-agent-plan.json {runs}/web-agent-plan-5s.json --out {out}/web-agent-plan.html",
        ),
    ),
    Piece(
        "chat-plan.html",
        "Report of a plan: 1,000 chat requests per second on the cheapest of three chips",
        (_CHAT_PLAN, "report {runs}/chat-plan.json --out {out}/chat-plan.html"),
    ),
    Piece(
        "lifetime.html",
        "Report of a lifetime study: what demand makes Llama-3-8B's 15T tokens right",
        (_STUDY, "report {runs}/lifetime.json --out {out}/lifetime.html"),
    ),
    Piece("run.png", "A run", (_CHAT,)),
    Piece("plan.png", "A plan: from the roofline to the fleet, and cost against latency", (_CHAT_PLAN,)),
    Piece("lifetime.png", "A lifetime study: cost against size, and what a wrong forecast costs", (_STUDY,)),
    Piece(
        "roofline.png",
        "A decode step on its roofline",
        (f"roofline {_70B} --slice tpu-v5e:4x4 --decode 32 --context 8192 --plot {{out}}/roofline.png",),
    ),
    Piece(
        "pareto.png",
        "Latency against throughput of decoding, on three slices",
        (f"pareto {_70B} --slice tpu-v5e:2x4,tpu-v5e:4x4,tpu-v5e:8x8 --contexts 2k,8k,32k --plot {{out}}/pareto.png",),
    ),
    Piece("pareto-textbook.png", "One of them in textbook terms", (_TEXTBOOK,)),
    Piece(
        "steps.png",
        "Parts of a decode step as the batch grows",
        (f"roofline {_70B} --slice tpu-v5e:4x4 --decode 32 --context 8192 --waterfall {{out}}/steps.png",),
    ),
    Piece(
        "speculation.png",
        "What draft tokens gain, batch by batch",
        (_SPECULATION,),
    ),
)


def make_gallery(out: Path, say: Callable[[str], None]) -> None:
    """Make every piece, and a page that lists them, in ``out``.

    An infeasible plan is an answer like others: its page says so.
    """
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as runs:
        taken: set[str] = set()
        for step in (step for piece in GALLERY for step in piece.steps):
            if step not in taken:
                taken.add(step)
                start = time.perf_counter()
                run_step(step.format(out=out.absolute(), runs=runs))
                say(f"{time.perf_counter() - start:5.1f} s  {_typed(step)}")
    (out / "README.md").write_text(index_text(GALLERY), encoding="utf-8")


def run_step(line: str) -> None:
    """Run a command line of this package without its output."""
    from simulator.cli.main import cli

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli(shlex.split(line), standalone_mode=False)
        except InfeasibleError:
            if not line.startswith("plan "):
                raise


def index_text(pieces: Sequence[Piece]) -> str:
    """The page that lists the pieces with their command lines."""
    lines = [
        "# Gallery",
        "",
        "Made by `chipseconds reproduce gallery --out reports/gallery`. Pages are whole in themselves: save one and open it in a browser.",
    ]
    for piece in pieces:
        name = f"![{piece.what}]({piece.file})" if piece.file.endswith(".png") else f"[{piece.file}]({piece.file})"
        lines += ["", f"## {piece.what}", "", name, "", *(f"    {_typed(step)}" for step in piece.steps)]
    return "\n".join(lines) + "\n"


def _typed(step: str) -> str:
    """A step as one would type it."""
    return "chipseconds " + step.replace("{out}/", "").replace("{runs}/", "runs/")
