"""``chipseconds scenarios``: what ships with the package, and a start for one's own."""

from pathlib import Path

import click

from simulator.cli.output import json_option, note, print_json, print_table


@click.group(invoke_without_command=True)
@click.pass_context
def scenarios(context: click.Context) -> None:
    """Scenarios that ship with the package; `list` if no subcommand is given."""
    if context.invoked_subcommand is None:
        context.invoke(list_scenarios)


@scenarios.command("list")
@json_option
def list_scenarios(as_json: bool = False) -> None:
    """List the scenarios."""
    from simulator.run import load_scenario, scenario_names

    loaded = [load_scenario(name) for name in scenario_names()]
    if as_json:
        fields = ("name", "description", "model", "slice", "precision")
        rows = [{field: getattr(s, field) for field in fields} | {"replicas": s.all_replicas} for s in loaded]
        print_json({"scenarios": rows})
        return
    lines = [[s.name, s.model, s.slice, s.precision, s.description] for s in loaded]
    print_table("", ["scenario", "model", "slice", "precision", "what it is"], lines)


@scenarios.command("show")
@click.argument("name")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field; may be repeated.")
@click.option("--resolved", is_flag=True, help="With every default filled in.")
@json_option
def show_scenario(name: str, overrides: tuple[str, ...], resolved: bool, as_json: bool) -> None:
    """Print scenario NAME as TOML."""
    from simulator.results import toml
    from simulator.run import load_scenario
    from simulator.run.scenario import scenario_file

    loaded = load_scenario(name, overrides)
    if as_json:
        print_json(loaded.as_toml())
    elif resolved or overrides:
        click.echo(toml.dumps(loaded.as_toml()), nl=False)
    else:
        click.echo(scenario_file(name).read_text(encoding="utf-8"), nl=False)


@scenarios.command("new")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--like", default="llama-3-8b-azure-chat", show_default=True, help="Scenario to start from.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field; may be repeated.")
def new_scenario(file: Path, like: str, overrides: tuple[str, ...]) -> None:
    """Write a new scenario FILE to edit, every field stated; an existing file is left alone."""
    from simulator.errors import InputError
    from simulator.results import toml
    from simulator.run import load_scenario

    if file.suffix != ".toml":
        raise InputError(f"{file}: a scenario file ends in .toml")
    data = load_scenario(like, overrides).as_toml() | {"name": file.stem}
    try:
        with file.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(toml.dumps(data))
    except FileExistsError:
        raise InputError(f"{file}: exists already; it is left alone") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from None
    note(f"wrote {file}; run it with: chipseconds simulate {file}")
