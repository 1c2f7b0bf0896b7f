"""The command of `samestep` that checks machines before a run: doctor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.cluster import Device, Image, SiteFile, as_of_sbatch
from launch.cli.options import RunsDir, example, nodes_option, option
from launch.console import add_row, echo, emit, table_console
from launch.errors import ConfigError
from launch.option_values import named, whole

if TYPE_CHECKING:
    from launch.doctor.finding import Finding

commands = typer.Typer()


@commands.command(
    epilog=example(
        "samestep doctor",
        "samestep doctor qwen2vl_7b_chartqa --gpus-per-node 4",
        "samestep doctor --nodes 2 --gpus-per-node 8 --partition gpu",
    )
)
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            parser=named("RECIPE"),
            help="Also look whether this recipe's base and data are there.",
            show_default=False,
        ),
    ] = None,
    nodes: Annotated[
        int | None, nodes_option("Look at so many nodes of a Slurm cluster instead of this machine.")
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        option(
            "--gpus-per-node",
            "N",
            "Processes that measure, one a GPU.",
            whole,
            1,
            unset="the GPUs present, 2 on a CPU; with --nodes 1",
        ),
    ] = None,
    runs_dir: RunsDir = Path("runs"),
    quick: Annotated[bool, typer.Option("--quick", help="Do not start processes that measure.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    site: SiteFile = None,
    partition: Annotated[str | None, as_of_sbatch("--partition")] = None,
    account: Annotated[str | None, as_of_sbatch("--account")] = None,
    qos: Annotated[str | None, as_of_sbatch("--qos")] = None,
    constraint: Annotated[str | None, as_of_sbatch("--constraint")] = None,
    container: Image = None,
    device: Device = None,
) -> None:
    """Check this machine, or nodes of a cluster, before a run: libraries, GPUs, disks, network, all-reduce.

    Takes less than a minute and never hangs; with --nodes, Slurm's queue comes before. Ends with 1 when a check failed.
    """
    from launch.doctor.finding import to_json, verdict

    of_site = {"partition": partition, "account": account, "qos": qos, "constraint": constraint}
    of_site |= {"container.image": container, "device": device}
    place = runs_dir.expanduser().absolute()
    if nodes is None:
        given = ["--site"] * (site is not None) + [
            f"--{key.partition('.')[0]}" for key, value in of_site.items() if value is not None
        ]
        if given:
            raise ConfigError(f"{given[0]}: is for nodes of a cluster; add --nodes, or leave it out")
        findings = _of_this_machine(recipe, gpus_per_node, place, quick)
        show = _show_machine
    else:
        findings, names = _of_nodes(nodes, gpus_per_node or 1, recipe, place, quick, site, of_site)
        show = partial(_show_nodes, names)
    if json:
        emit(to_json(findings))
    else:
        show(findings)
        echo(verdict(findings))
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(1)


def _of_this_machine(
    recipe: str | None, gpus_per_node: int | None, runs_dir: Path, quick: bool
) -> list[Finding]:
    from rich.console import Console

    from launch.doctor.node import check_node
    from launch.doctor.probe import judge, measure
    from launch.hardware import CPU_PROCESSES, gpus_present
    from launch.local.topology import refuse_what_is_not_here
    from launch.planning.topology import Topology
    from launch.recipe.loading import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe)) if recipe else None
    present = gpus_present()
    processes = gpus_per_node or present or CPU_PROCESSES
    refuse_what_is_not_here(Topology("ddp", 1, processes, "cuda" if present else "cpu"))
    with Console(stderr=True).status("checking this machine"):
        findings = list(check_node(runs_dir, loaded))
    if not quick:
        with Console(stderr=True).status(f"measuring with {processes} processes"):
            findings += judge(measure(processes))
    return findings


def _of_nodes(
    nodes: int,
    gpus_per_node: int,
    recipe: str | None,
    runs_dir: Path,
    quick: bool,
    site: Path | None,
    of_site: dict[str, str | None],
) -> tuple[list[Finding], list[str]]:
    from launch.doctor.on_slurm import Look, look_at_nodes
    from launch.recipe.loading import find_recipe, load_recipe
    from launch.slurm.site import load_site

    chosen = load_site(site, dict(of_site))
    if recipe:
        load_recipe(find_recipe(recipe))  # refused here, before there are nodes
    look = Look(nodes, gpus_per_node, runs_dir, recipe or "", quick)
    names, findings = look_at_nodes(look, chosen, lambda line: echo(line, to_stderr=True))
    return findings, names


def _show_machine(findings: Sequence[Finding]) -> None:
    from rich.table import Table

    table = Table("check", "state", "what was seen", "what to do", title_justify="left")
    for finding in findings:
        add_row(table, finding.check, finding.state, finding.text, finding.remedy)
    table_console().print(table)


def _show_nodes(names: Sequence[str], findings: Sequence[Finding]) -> None:
    from launch.doctor.reports import print_nodes

    print_nodes(table_console(), findings, names)
