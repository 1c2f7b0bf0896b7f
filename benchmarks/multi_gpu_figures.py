"""What the runs of `multi_gpu.py` left behind, put into figures beside what `scaling.py` predicts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scaling import LORA_BYTES, all_reduce_seconds, random_deal, rank_costs
from launch.inputs.dataset_index import read_index
from launch.planning.plan import Plan
from launch.planning.run_steps import step_plan
from launch.recipe.loading import load_recipe
from launch.run.directory import RunDirectory, read_marker
from launch.strategies import STRATEGIES

WARM_UP = 2
LOSS_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Measured:
    """One run. Lists of steps are in their order, lists of ranks too; shares are of the step time.

    `outcome`: the marker, or how it ended without one. `counted`: places of the steps that times are taken from.
    `work`: what the slowest rank has to do in the counted steps, in `launch.planning.step_plan.cost`'s unit.
    """

    name: str
    strategy: str
    processes: int
    global_batch: int
    assignment: str
    outcome: str
    micro_batches: int = 0
    losses: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    loading_gib: list[float] = field(default_factory=list)
    training_gib: list[float] = field(default_factory=list)
    layers_gib: list[float] = field(default_factory=list)
    whole_layers_gib: list[float] = field(default_factory=list)
    waiting: float | None = None
    communication: float | None = None
    all_reduce_s: float | None = None
    profiled: dict[str, Any] = field(default_factory=dict)
    work: float = 0.0
    predicted_waiting: float = 0.0
    predicted_reducing_s: float = 0.0
    device: str = ""

    @property
    def step_s(self) -> float:
        """Mean of the counted steps: other runs of the same batch take the same samples in them."""
        return statistics.mean(self.seconds[place] for place in self.counted)

    @property
    def tokens_s(self) -> float:
        return sum(self.tokens[place] for place in self.counted) / (self.step_s * len(self.counted))

    @property
    def busy_share(self) -> float | None:
        """Of the profiled seconds, in which rank 0's GPU does anything.

        They end when the GPU has done what it was given, so with the next step's tower where that runs ahead; this
        step's own ran before.
        """
        busy, seconds = self.profiled.get("profiled_busy_s"), self.profiled.get("profiled_s")
        return busy / seconds if busy and seconds else None

    @property
    def slowest(self) -> float:
        """The slowest counted step over the median, both a token: how much the steps differ beside their sizes."""
        each = [self.seconds[place] / self.tokens[place] for place in self.counted]
        return max(each) / statistics.median(each)

    def in_short(self) -> str:
        """For a line of progress."""
        if not self.counted:
            return f"{len(self.losses)} steps"
        return f"{self.step_s:.3f} s a step, {self.global_batch / self.step_s:.2f} samples/s"


def summarize(
    name: str,
    strategy: str,
    processes: int,
    global_batch: int,
    assignment: str,
    folder: Path,
    clocks: Path,
    profiled: int,
) -> Measured:
    """Read a run's folder and the clocks of its ranks; also of one that was cut off. `profiled`: the step, or 0."""
    run = RunDirectory(folder)
    marker = read_marker(run)
    outcome = "ended without a marker" if marker is None else marker.kind
    metrics = _lines(run.metrics_file)
    ranks = [_lines(clocks / f"rank-{rank}.jsonl") for rank in range(processes)]
    moments = [[line for line in lines if "step" in line] for lines in ranks]
    steps = min(len(lines) for lines in (metrics, *moments))  # one that was ended may lack a line
    if steps == 0:
        return Measured(name, strategy, processes, global_batch, assignment, outcome)
    metrics, moments = metrics[:steps], [lines[:steps] for lines in moments]
    seconds = [line["seconds"] for line in metrics]
    counted = counted_steps(len(metrics), profiled)
    facts = [next((line for line in reversed(lines) if "step" not in line), {}) for lines in ranks]
    traced = [fact["profiled_exposed_s"] for fact in facts if "profiled_exposed_s" in fact]
    waiting = communication = None
    if STRATEGIES[strategy].sharded == "nothing":  # the others' ranks wait for each other inside their passes
        waiting, communication = shares_of_clocks(moments, seconds, counted)
    elif len(traced) == processes:
        waiting, communication = shares_of_trace(traced, min(fact["profiled_s"] for fact in facts))
    plan = Plan.from_json(run.plan_file.read_text())
    return Measured(
        name=name,
        strategy=strategy,
        processes=processes,
        global_batch=global_batch,
        assignment=assignment,
        outcome=outcome,
        micro_batches=plan.micro_batches,
        losses=[line["loss"] for line in metrics],
        digests=[line["samples_digest"] for line in metrics],
        seconds=seconds,
        tokens=[line["tokens"] for line in metrics],
        counted=counted,
        waiting=waiting,
        communication=communication,
        loading_gib=[fact["loading_gib"] for fact in facts if fact.get("loading_gib")],
        training_gib=[fact["training_gib"] for fact in facts if fact.get("training_gib")],
        layers_gib=[fact["layers_gib"] for fact in facts if "layers_gib" in fact],
        whole_layers_gib=[fact["whole_layers_gib"] for fact in facts if "whole_layers_gib" in fact],
        all_reduce_s=facts[0].get("all_reduce_s"),
        profiled={key: value for key, value in facts[0].items() if key.startswith("profiled")},
        device=facts[0].get("device", ""),
        **prediction(run, plan, assignment, counted),
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """Of a JSON lines file; none where it is not there, and without a last one that was cut off."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def counted_steps(steps: int, profiled: int) -> list[int]:
    """Places (from 0) of the steps that times are taken from: not the first two, not a profiled one or the next."""
    kept = [place for place in range(WARM_UP, steps) if not profiled or place not in (profiled - 1, profiled)]
    return kept or list(range(max(0, steps - 1), steps))


def shares_of_clocks(
    moments: Sequence[Sequence[Mapping[str, float]]], seconds: Sequence[float], counted: Sequence[int]
) -> tuple[float, float]:
    """(share of the step time that ranks wait for the last one, share that adding up takes then), mean over ranks."""
    waited = added = 0.0
    for place in counted:
        ready = [lines[place]["ready"] for lines in moments]
        done = [lines[place]["done"] for lines in moments]
        waited += max(ready) - statistics.mean(ready)
        added += statistics.mean(done) - max(ready)
    whole = sum(seconds[place] for place in counted)
    return waited / whole, added / whole


def shares_of_trace(exposed: Sequence[float], seconds: float) -> tuple[float, float]:
    """(waiting, communication) of one step from the seconds of each rank in which only NCCL's kernels ran.

    Such a kernel also lasts while it waits: the rank that waits least is taken to wait for nobody.
    """
    return (statistics.mean(exposed) - min(exposed)) / seconds, min(exposed) / seconds


def prediction(run: RunDirectory, plan: Plan, assignment: str, counted: Sequence[int]) -> dict[str, float]:
    """What `scaling.py` says of the counted steps, from the plan and the index of the run."""
    recipe = load_recipe(run.recipe_file)
    index = read_index(recipe)
    if index is None:
        return {}
    steps = step_plan(recipe, index, plan)
    slowest = mean = 0.0
    for place in counted:
        dealt = (
            steps.ranks(place)
            if assignment == "balanced"
            else random_deal(
                steps.samples(place),
                steps.tokens,
                steps.costs,
                plan.world_size,
                plan.micro_batch_tokens,
                plan.micro_batches,
            )
        )
        work = rank_costs(dealt, np.asarray(steps.costs))
        slowest, mean = slowest + float(work.max()), mean + float(work.mean())
    return {
        "work": slowest,
        "predicted_waiting": 1 - mean / slowest,
        "predicted_reducing_s": all_reduce_seconds(LORA_BYTES, plan.world_size),
    }


def like_for_like(each: Measured, results: Sequence[Measured]) -> Measured | None:
    """The run on one GPU with as many samples a step; None where there is no other."""
    alike = (
        one for one in results if one.processes == 1 and one.global_batch == each.global_batch and one.counted
    )
    return next((one for one in alike if one.name != each.name), None)


def judge(each: Measured, single: Measured | None) -> list[str]:
    """What is not as promised, in words. `single`: as of `like_for_like`."""
    if each.outcome != "DONE":
        return [each.outcome]
    if single is None:
        return []
    problems = []
    if each.digests != single.digests:
        problems.append(f"other samples than {single.name}")
    if (apart := losses_apart(each, single)) > LOSS_TOLERANCE:
        problems.append(f"losses {apart:.1e} from {single.name}")
    return problems


def losses_apart(each: Measured, single: Measured) -> float:
    """The largest relative difference of a step's loss."""
    pairs = zip(each.losses, single.losses, strict=False)
    return max(abs(one - other) / abs(other) for one, other in pairs)


def report(asked: Mapping[str, Any], results: Sequence[Measured]) -> None:
    """The table, what to read in it, and the JSON line."""
    from rich.console import Console
    from rich.table import Table

    known = {each.name: each for each in results}
    single = known.get("single")
    device = next((each.device for each in results if each.device), "")
    table = Table(
        title=f"{asked['gpus']} x {device}, random weights ({asked['shape']}), default recipe, chart-sized images",
        title_justify="left",
    )
    columns = (
        *(
            "run",
            "GPUs x samples",
            "s/step",
            "samples/s",
            "efficiency",
            "GiB loading, training",
            "layers GiB",
        ),
        *("us/token, slowest", "GPU busy, launches"),
        *("loss against single", "waiting (predicted)", "communication (predicted)", "guards, digests"),
    )
    for column in columns:
        table.add_column(column)
    for each in results:
        table.add_row(*row(each, like_for_like(each, results), single))
    Console(width=200).print(table)
    for line in comparisons(known):
        print(line)
    print(json.dumps({**asked, "results": [_short(each) for each in results]}))


def row(each: Measured, alike: Measured | None, single: Measured | None) -> list[str]:
    """One line of the table. `alike`: as of `like_for_like`; `single`: the run of that name."""
    problems = judge(each, alike)
    if not each.counted:
        return [
            each.name,
            f"{each.processes} x {each.global_batch / each.processes:g}",
            *[""] * 10,
            each.outcome,
        ]
    reducing = each.predicted_reducing_s / each.step_s
    several = each.processes > 1
    return [
        each.name,
        f"{each.processes} x {each.global_batch / each.processes:g}",
        f"{each.step_s:.3f}",
        f"{each.global_batch / each.step_s:.2f}",
        _efficiency(each, alike, single),
        f"{_most(each.loading_gib)}, {_most(each.training_gib)}",
        _most(each.layers_gib),
        f"{1e6 * each.processes / each.tokens_s:.1f}, {each.slowest:.2f} x",
        f"{_share(each.busy_share)}, {each.profiled.get('profiled_launches', '-')}",
        f"{losses_apart(each, alike):.1e}" if alike else "",
        f"{_share(each.waiting)} ({each.predicted_waiting:.2%})" if several else "",
        f"{_share(each.communication)} ({reducing:.2%})" if several else "",
        "; ".join(problems) if problems else "quiet" + (", equal" if alike else ""),
    ]


def _efficiency(each: Measured, alike: Measured | None, single: Measured | None) -> str:
    """The share of so many times one GPU's speed: with as many samples a step, and of `single` if that is another."""

    def against(one: Measured) -> str:
        return f"{each.tokens_s / (each.processes * one.tokens_s):.1%}"

    parts = [against(alike)] if alike and each.processes > 1 else []
    if single and single.counted and single not in (each, alike):
        parts.append(f"{against(single)} of single with {single.global_batch:g}")
    return ", ".join(parts)


def comparisons(known: Mapping[str, Measured]) -> list[str]:
    """The figures that two runs make together, beside their prediction."""
    lines = []
    for balanced, shuffled in (("ddp", "ddp-random"), ("ddp-per-gpu", "ddp-per-gpu-random")):
        one, other = known.get(balanced), known.get(shuffled)
        if one and other and one.counted and other.counted and one.work and other.work:
            places = [place for place in one.counted if place in other.counted]
            ratio = sum(one.seconds[p] for p in places) / sum(other.seconds[p] for p in places)
            lines.append(
                f"{balanced}, balanced against random: {ratio:.3f} x the step time "
                f"(predicted {one.work / other.work:.3f} x)"
            )
    for name in ("fsdp", "zero3"):
        each = known.get(name)
        if each and each.layers_gib and each.whole_layers_gib:
            here, whole = max(each.layers_gib), each.whole_layers_gib[0]
            lines.append(
                f"{name} on {each.processes}: decoder layers {here:.3f} of {whole:.3f} GiB a GPU, 1/{whole / here:.2f}"
            )
    for each in known.values():
        if each.all_reduce_s:
            lines.append(
                f"{each.name}: adding up the adapters' gradients by itself takes {each.all_reduce_s * 1e3:.2f} ms "
                f"(predicted {each.predicted_reducing_s * 1e3:.2f} ms)"
            )
            break
    return lines


def _short(each: Measured) -> dict[str, Any]:
    """Of the JSON line: without what is long and equal to single's."""
    values = asdict(each)
    del values["digests"]
    return {key: _rounded(value) for key, value in values.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _most(values: Sequence[float]) -> str:
    return f"{max(values):.2f}" if values else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
