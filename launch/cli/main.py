"""The `samestep` command. Imports of substance are inside the commands: `--help` stays fast."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launch.atomic_files import place_of
from launch.cli.audit import commands as audit_commands
from launch.cli.cluster import commands as cluster_commands
from launch.cli.data import commands as data_commands
from launch.cli.local import commands as local_commands
from launch.cli.machines import commands as machines_commands
from launch.cli.merging import commands as merging_commands
from launch.cli.monitor import commands as monitor_commands
from launch.cli.options import AsJson, example
from launch.cli.results import commands as results_commands
from launch.cli.shipping import commands as shipping_commands
from launch.console import add_row, echo, emit, table_console, take_any_terminal
from launch.errors import ConfigError, RunError, SamestepError
from launch.invocation import as_typed, remember_command
from launch.subprocesses import ChildError
from launch.untrusted_files import printable_lines

app = typer.Typer(
    help="One QLoRA fine-tuning recipe, the same training run on one GPU, several GPUs or several nodes.",
    epilog="Begin with: samestep run recipes/embedded.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(requested: bool) -> None:
    if requested:
        from launch.versions import version_line

        echo(version_line())
        raise typer.Exit


@app.callback()
def samestep(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show this version and the libraries'."
        ),
    ] = False,
) -> None:
    """Options without a command."""


_PLACE_ERRORS = (
    *(errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT),
    *(errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENXIO),
)

_REMEDIES = dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS), "choose")
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM), "give permission, or choose")

reference = typer.Typer()  # on its own because `--help` lists a group's commands in the order of the groups


@reference.command(epilog=example("samestep rules"))
def rules(as_json: AsJson = False) -> None:
    """Show what is refused before anything starts, and why."""
    import json

    from rich.table import Table

    from launch.rules.checks import rule_rows

    if as_json:
        emit(json.dumps([{"rule": name, "why": reason} for name, reason in rule_rows()], indent=1))
        return
    table = Table("rule", "why", title="what is refused", title_justify="left", show_lines=True)
    for name, reason in rule_rows():
        add_row(table, name, reason)
    table_console().print(table)


@reference.command(epilog=example("samestep schema > recipe.schema.json"))
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    import json

    from launch.recipe.schema import recipe_schema

    emit(json.dumps(recipe_schema(), indent=1))


for group in (
    local_commands,
    cluster_commands,
    monitor_commands,
    data_commands,
    results_commands,
    merging_commands,
    shipping_commands,
    audit_commands,
    machines_commands,
    reference,
):
    app.add_typer(group)  # in the order in which somebody comes to need them


def main() -> None:
    """Entry point: typer ends usage errors (2) and Ctrl-C (130), our errors become lines, not tracebacks."""
    try:
        Path.cwd()
    except FileNotFoundError:
        _print_error("current folder: was removed; change to one that is there", ConfigError.exit_status)
    remember_command()
    take_any_terminal()
    try:
        app(prog_name="samestep")
    except ChildError as error:  # the child has said on this terminal what is wrong
        sys.exit(error.exit_status) if error.was_explained else _print_error(str(error), error.exit_status)
    except SamestepError as error:
        _print_error(str(error), error.exit_status)
    except OSError as error:
        if error.errno not in _PLACE_ERRORS:
            raise
        remedy = _REMEDIES.get(error.errno, "make room, or choose")
        _print_error(f"{place_of(error, 'disk')}; {remedy} another place", ConfigError.exit_status)
    except MemoryError:
        _print_error(
            "memory: this process was given no more; end other processes, or raise its limit (`ulimit -v` shows it)",
            RunError.exit_status,
        )


def _print_error(text: str, status: int) -> NoReturn:
    print(printable_lines(as_typed(text)), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
