"""The table of a campaign: RESULTS.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tests.faults.chain import STEPS
from tests.faults.outcomes import Limits, Outcome, Result
from tests.long.results import stamp

_VERSIONS = ("accelerate", "deepspeed", "transformers", "trl", "peft", "bitsandbytes")


def write_table(file: Path, seed: int, results: Sequence[Result]) -> None:
    """Replace the file."""
    outcomes = [outcome for result in results for outcome in result.outcomes]
    counted = {
        word: sum(outcome.trouble.startswith(word) for outcome in outcomes) for word in ("hung", "by hand")
    }
    lost = sum(result.lost for result in results) + sum(o.trouble.startswith("lost") for o in outcomes)
    moved = [result for result in results if result.verdict.startswith("moved") and not result.lost]
    same = sum(result.verdict == "the same to the byte" for result in results)
    minutes = sum(result.seconds for result in results) / 60
    lines = [
        "# What `make test-faults` showed",
        "",
        f"Random chains of faults against a run of {STEPS} steps (a tiny Qwen2-VL, nf4, dropout, gloo), each followed",
        "by the same `samestep run` and nothing else; two chains at a time.",
        "",
        f"- *Hung*: processes were left {Limits().end:.0f} s after a fault, or no step was taken "
        f"{Limits().start:.0f} s after a start.",
        "- *By hand*: the same command failed.",
        "- *Lost*: in the end it is not the undisturbed run (same layout: any byte of the adapter, any figure of a",
        "  step; moved: more than 1e-6), or a whole checkpoint or the step of an announced stop was not gone on from.",
        "",
        f"Seed {seed}. {stamp()} " + ", ".join(f"{name} {version(name)}" for name in _VERSIONS) + ".",
        "",
        f"**{len(outcomes)} faults in {len(results)} chains ({minutes:.0f} minutes of chains): {lost} lost, "
        f"{counted['hung']} hung, {counted['by hand']} by hand;",
        f"{same} chains the same to the byte, {len(moved)} moved within 1e-6.**",
        "",
        "| fault | suffered | survived | all ended after at most | went on after at most |",
        "|---|---|---|---|---|",
        *(_kind(kind, outcomes) for kind in sorted({outcome.kind for outcome in outcomes})),
        "",
        "## The chains",
        "",
        *(line for result in results for line in _chain(result)),
    ]
    file.write_text("\n".join(lines).rstrip() + "\n")


def _kind(kind: str, outcomes: Sequence[Outcome]) -> str:
    own = [outcome for outcome in outcomes if outcome.kind == kind]
    survived = sum(not outcome.trouble for outcome in own)
    ended = _longest([outcome.ended for outcome in own])
    return (
        f"| {kind} | {len(own)} | {survived} | {ended} | {_longest([outcome.went_on for outcome in own])} |"
    )


def _longest(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{max(known):.1f} s" if known else "-"


def _chain(result: Result) -> list[str]:
    lines = [
        f"{result.number}. {result.layout}, {result.seconds:.0f} s: {'LOST, ' * result.lost}{result.verdict}"
    ]
    for outcome in result.outcomes:
        ended = "" if outcome.ended is None else f", ended after {outcome.ended:.1f} s"
        went_on = "" if outcome.went_on is None else f", went on after {outcome.went_on:.1f} s"
        lines.append(f"   - {outcome.fault}: {outcome.trouble or 'survived'}{ended}{went_on}")
    if result.missed:
        lines.append(f"   - {result.missed} more came too late: the run was done")
    return lines
