"""The figures of `throughput.py`'s sides beside each other."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.random_base import GLOBAL_BATCH

WARM_UP = 2
LOSSES_EVERY = 5


def finished(result: dict[str, Any], ceiling: float | None) -> dict[str, Any]:
    """A side's result with its figures; `ceiling`: operations a second, or None where there is no GPU."""
    places = counted(len(result["seconds"]), result["profiled"])
    seconds = [result["seconds"][place] for place in places]
    median = statistics.median(seconds)
    rate = statistics.median(
        result["flops"][place] / second for place, second in zip(places, seconds, strict=True)
    )
    return result | {
        "median_step_s": round(median, 4),
        "samples_s": round(GLOBAL_BATCH / median, 2),
        "tokens_s": round(
            statistics.median(
                result["tokens"][place] / second for place, second in zip(places, seconds, strict=True)
            )
        ),
        "counted_flops_s": rate,
        "ceiling_share": rate / ceiling if ceiling else None,
    }


def counted(steps: int, profiled: Sequence[int]) -> list[int]:
    """Places of the steps that medians are of."""
    kept = [place for place in range(WARM_UP, steps) if place not in profiled]
    return kept or list(range(steps))


def loss_apart(result: dict[str, Any], reference: dict[str, Any]) -> float:
    """The largest relative difference of a step's loss, over the steps that both took."""
    pairs = zip(result["loss"], reference["loss"], strict=False)
    return max(abs(one - other) / abs(other) for one, other in pairs)


def report(facts: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Speed, losses, profiles, and the JSON line."""
    import torch
    from rich.console import Console

    console = Console(width=150, highlight=False)
    facts = facts | {"machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    sides = {result["side"]: result for result in results}
    reference = sides.get("notebook") or sides.get("tuned") or (results[0] if results else None)
    console.print(speed_table(facts, results, reference))
    if results:
        console.print(loss_table(results))
    for result in results:
        if parts := result.get("first_step"):
            console.print(first_step_line(result["side"], parts))
        if result.get("profile"):
            console.print(profile_table(result))
    names = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "liger-kernel")
    print(json.dumps({**facts, "versions": {name: _version(name) for name in names}, "results": results}))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # carried in without its metadata
        return "not known"


def speed_table(
    facts: dict[str, Any], results: Sequence[dict[str, Any]], reference: dict[str, Any] | None
) -> Any:
    """A line a side."""
    from rich.table import Table

    ceiling = facts.get("ceiling")
    measured = f", matrix products {ceiling / 1e12:.0f} TFLOP/s (8192 cubed, bf16)" if ceiling else ""
    if heated := facts.get("heated_ceiling"):
        measured += f", {heated / 1e12:.0f} after 3 s of them"
    weights = f"random weights ({facts['family']}, {facts['shape']}, {facts['images']})"
    table = Table(
        title=f"steps of {GLOBAL_BATCH} samples, {weights}, {facts['machine']}{measured}",
        title_justify="left",
    )
    against = reference["side"] if reference else "trl"
    columns = ("side", "steps", "s/step", "samples/s", "tokens/s", f"x {against}", "peak GiB", "planned")
    for column in (
        *columns,
        "counted TFLOP/s",
        "of the ceiling",
        "first step after s",
        f"loss from {against}",
    ):
        table.add_column(column)
    for result in results:
        table.add_row(
            result["side"],
            str(len(result["seconds"])),
            f"{result['median_step_s']:.3f}",
            f"{result['samples_s']:.2f}",
            f"{result['tokens_s']:,}",
            f"{reference['median_step_s'] / result['median_step_s']:.2f}" if reference else "",
            f"{result['peak_gib']:.2f}" if result["peak_gib"] is not None else "-",
            f"{result['planned_gib']:.2f}" if result.get("planned_gib") else "-",
            f"{result['counted_flops_s'] / 1e12:.0f}" if ceiling and facts["shape"] == "7b" else "-",
            f"{result['ceiling_share']:.1%}" if ceiling and facts["shape"] == "7b" else "-",
            f"{result['first_step_s']:.0f}",
            f"{loss_apart(result, reference):.1e}" if reference and result is not reference else "",
        )
    return table


def first_step_line(side: str, parts: dict[str, float]) -> str:
    """What the time to a side's first step went into; before `imports` ends, the benchmark's own are in it."""
    spent = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items() if part != "total")
    return f"{side}: first step after {parts['total']:.1f} s: {spent}"


def loss_table(results: Sequence[dict[str, Any]]) -> Any:
    """The loss of the first step and of every LOSSES_EVERY-th, a column a side."""
    from rich.table import Table

    table = Table("step", *[result["side"] for result in results], title="loss", title_justify="left")
    longest = max(len(result["loss"]) for result in results)
    for step in [1, *range(LOSSES_EVERY, longest + 1, LOSSES_EVERY)]:
        losses = [result["loss"] for result in results]
        table.add_row(str(step), *[f"{each[step - 1]:.4f}" if step <= len(each) else "" for each in losses])
    return table


def profile_table(result: dict[str, Any]) -> Any:
    """The kernels of a step."""
    from rich.table import Table

    profile = result["profile"]
    title = (
        f"{result['side']}, profiled over {profile['steps']} steps: {profile['step_s']:.3f} s a step, GPU busy "
        f"{profile['busy_share']:.1%}, the host waited for it {profile['host_syncs']:.0f} times a step"
    )
    table = Table("ms a step", "of the step", "calls", "kernel", title=title, title_justify="left")
    for kernel in profile["kernels"]:
        share = kernel["seconds"] / profile["step_s"]
        table.add_row(
            f"{kernel['seconds'] * 1e3:.1f}", f"{share:.1%}", f"{kernel['calls']:.0f}", kernel["name"][:100]
        )
    return table
