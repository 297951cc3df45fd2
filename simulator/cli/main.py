"""The ``chipseconds`` command: parses, calls one room, renders.

Commands are imported when they are called, so that ``--help`` answers at once.
"""

import sys
from importlib import import_module

import click

from simulator import __version__
from simulator.errors import ChipsecondsError, nearest

#: command -> (module, one-line help). The function in the module carries the command's name.
COMMANDS = {
    "roofline": ("simulator.cli.roofline", "What one prefill or decode step costs, op by op, and what bounds it."),
    "pareto": ("simulator.cli.pareto", "Latency against throughput of decoding, over the batch and context."),
    "fit": ("simulator.cli.fit", "What fits where: smallest slices, KV capacity and batch of every chip."),
    "simulate": ("simulator.cli.simulate", "Run a scenario: TTFT, TPOT, goodput and chip-seconds per query."),
    "plan": ("simulator.cli.plan", "A rate of queries and latency targets: the cheapest fleet, and why."),
    "speculation": ("simulator.cli.speculation", "What speculative decoding is worth at each batch."),
    "explain": ("simulator.cli.explain", "Where one request's time went, and who was ahead of it."),
    "compare": ("simulator.cli.compare", "Compare two simulation results."),
    "lifetime": ("simulator.cli.lifetime", "The model that costs least to train and to serve, at a quality."),
    "prices": (
        "simulator.cli.prices",
        "What chips cost by term, owning one, training a model, break-even with an API.",
    ),
    "report": ("simulator.cli.report", "One self-contained HTML page about results."),
    "calibrate": ("simulator.cli.calibrate", "Fit the cost model to measured kernels and servers."),
    "validate": (
        "simulator.cli.validate",
        "Measured serving runs through the simulator: errors by model, chip, engine, load.",
    ),
    "reproduce": ("simulator.cli.reproduce", "Published numbers against ours."),
    "hardware": ("simulator.cli.hardware", "Chips and slices of the catalogue, with sources."),
    "models": ("simulator.cli.models", "Model architectures of the catalogue, with parameter counts."),
    "scenarios": ("simulator.cli.scenarios", "Scenarios that ship with the package."),
}


class LazyGroup(click.Group):
    """A click group whose commands are imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the table above."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            ctx.fail(f"unknown command {cmd_name!r}{nearest(cmd_name, COMMANDS)}")
        command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{COMMANDS[cmd_name][0]}.{cmd_name} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command list without importing any."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="chipseconds")
def cli() -> None:
    """Inference cost simulator and roofline analyzer: from a trace to chip-seconds per query.

    Every command takes names from the catalogue or paths to your own files, and --json for one JSON document.
    Exit codes: 0 answered, 1 the answer is "no" (does not fit, check missed), 2 malformed input.
    """


def main() -> None:
    """Entry point: turns this package's errors into one message and an exit code."""
    try:
        cli(standalone_mode=True)
    except ChipsecondsError as error:
        click.echo(f"chipseconds: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
