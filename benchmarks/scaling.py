"""What stragglers and communication cost at 1 to 512 ranks, simulated from token lengths: no GPU, no model.

    python benchmarks/scaling.py                                   # lengths drawn as ChartQA's images have them
    python benchmarks/scaling.py --recipe qwen2vl_7b_chartqa       # the real ones, after `samestep prepare`

Three ways to give the samples of a step to the ranks: `random`, `padded` (random, and micro-batches of 4 padded to
their longest sample, as plain trl runs them) and `balanced` (`launch.planning.load_balance`, what samestep does).
A step lasts as long as its slowest rank's work (`launch.planning.step_plan.cost`) and the all-reduce of the adapters'
gradients. Speed of the ranks and of the network are assumptions (`--tflops`, `--in-node`, `--between-nodes`);
data loading is not in it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from launch.planning.load_balance import MicroBatch, assign
from launch.planning.step_plan import cost

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
ASSIGNMENTS = ("random", "padded", "balanced")
PADDED_TOGETHER = 4  # samples of a micro-batch of plain trl, padded to the longest
BUDGET_IN_SAMPLES = 4  # as `micro_batch_tokens: auto` holds four of the longest sample
LORA_BYTES = 4 * 2_523_136  # fp32 gradients of r 8 on q_proj and v_proj of the 7B model
LATENCY = 15e-6  # seconds for each doubling of the ranks: a small all-reduce's


@dataclass(frozen=True)
class Lengths:
    """Token counts of the samples of a split, [n] each; `source` in words."""

    text: Ints
    visual: Ints
    source: str

    @property
    def tokens(self) -> Ints:
        """Text and visual tokens."""
        return self.text + self.visual


@dataclass(frozen=True)
class Network:
    """Bus bandwidth of an all-reduce in bytes a second, inside a node of `gpus_per_node` and between nodes."""

    in_node: float = 330e9
    between_nodes: float = 45e9
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Simulated:
    """Steps of one layout. Seconds are means over the steps; `slowest` is the slowest rank's work over the mean's,
    `step` the step time over that of perfectly level work without padding or communication."""

    ranks: int
    samples_per_rank: int
    assignment: str
    slowest: float
    step: float
    straggler_share: float
    communication_share: float


def all_reduce_seconds(size: float, ranks: int, network: Network = Network()) -> float:
    """Of `size` bytes over `ranks`: a ring moves 2 (n - 1) / n of them over the slowest link, after the latency."""
    if ranks < 2:
        return 0.0
    bus = network.in_node if ranks <= network.gpus_per_node else network.between_nodes
    return float(LATENCY * np.log2(ranks) + 2 * (ranks - 1) / ranks * size / bus)


def random_deal(
    samples: Ints | Sequence[int],
    tokens: Ints,
    costs: Floats,
    world_size: int,
    budget: int,
    micro_batches: int | None = None,
) -> list[list[MicroBatch]]:
    """Called as `launch.planning.load_balance.assign`; every rank gets as many samples, as from a shuffling sampler.

    Deterministic in the samples, so that all ranks find the same. The budget is not kept: a rank's micro-batches are
    level in tokens, and as many as are asked for.
    """
    positions, lengths = np.asarray(samples, dtype=np.int64), np.asarray(tokens)
    order = np.random.default_rng(int(positions.sum())).permutation(positions)
    filler = MicroBatch((int(positions[lengths[positions].argmin()]),), filler=True)
    return [
        [
            MicroBatch(tuple(sorted(part)), filler=False) if part else filler
            for part in _level(mine.tolist(), lengths, micro_batches or 1)
        ]
        for mine in np.array_split(order, world_size)
    ]


def _level(samples: list[int], tokens: Ints, count: int) -> list[list[int]]:
    """`count` groups: the longest sample first, each into the shortest group."""
    groups: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for sample in sorted(samples, key=lambda each: (-int(tokens[each]), each)):
        shortest = sizes.index(min(sizes))
        groups[shortest].append(sample)
        sizes[shortest] += int(tokens[sample])
    return groups


def rank_costs(ranks: Sequence[Sequence[MicroBatch]], costs: Floats) -> Floats:
    """The work of each rank in a step, fillers included, [ranks]."""
    return np.array([sum(costs[list(batch.samples)].sum() for batch in batches) for batches in ranks])


def padded_costs(ranks: Sequence[Sequence[MicroBatch]], lengths: Lengths) -> Floats:
    """As `rank_costs`, every sample as long for the language model as the longest of its PADDED_TOGETHER."""
    found = []
    for batches in ranks:
        mine = np.array([sample for batch in batches for sample in batch.samples])
        parts = [mine[at : at + PADDED_TOGETHER] for at in range(0, len(mine), PADDED_TOGETHER)]
        width = np.concatenate([np.full(len(part), lengths.tokens[part].max()) for part in parts])
        found.append(cost(width - lengths.visual[mine], lengths.visual[mine]).sum())
    return np.array(found)


def simulate(
    lengths: Lengths,
    ranks: int,
    samples_per_rank: int,
    assignment: str,
    *,
    steps: int,
    tflops: float,
    network: Network = Network(),
    seed: int = 0,
) -> Simulated:
    """Mean of `steps` steps of `ranks * samples_per_rank` samples each; `tflops`: of a rank, in `cost`'s count."""
    draw = np.random.default_rng(seed)
    costs = cost(lengths.text, lengths.visual)
    budget = BUDGET_IN_SAMPLES * int(lengths.tokens.max())
    slowest, level, mean = [], [], []
    for _ in range(steps):
        samples = draw.integers(len(costs), size=ranks * samples_per_rank)
        if assignment == "balanced":
            work = rank_costs(assign(samples, lengths.tokens, costs, ranks, budget), costs)
        else:
            dealt = random_deal(samples, lengths.tokens, costs, ranks, budget)
            work = rank_costs(dealt, costs) if assignment == "random" else padded_costs(dealt, lengths)
        slowest.append(work.max())
        mean.append(work.mean())
        level.append(costs[samples].sum() / ranks)
    seconds = float(np.mean(slowest)) / (tflops * 1e3)  # costs are GFLOP
    reducing = all_reduce_seconds(LORA_BYTES, ranks, network)
    whole = seconds + reducing
    return Simulated(
        ranks=ranks,
        samples_per_rank=samples_per_rank,
        assignment=assignment,
        slowest=float(np.sum(slowest) / np.sum(mean)),
        step=whole / (float(np.mean(level)) / (tflops * 1e3)),
        straggler_share=(seconds - float(np.mean(mean)) / (tflops * 1e3)) / whole,
        communication_share=reducing / whole,
    )


def chart_lengths(count: int, seed: int = 0) -> Lengths:
    """Lengths as the charts of `benchmarks/random_base.py` have them: ChartQA's image sizes, its short questions."""
    from benchmarks.random_base import chart_size

    draw = random.Random(seed)
    sizes = [chart_size(draw) for _ in range(count)]
    visual = [
        round(height / 28) * round(width / 28) for width, height in sizes
    ]  # one token for 28 x 28 pixels
    text = [draw.randint(110, 136) for _ in sizes]
    return Lengths(
        np.array(text), np.array(visual), f"{count:,} drawn as ChartQA's images are sized (simulated)"
    )


def prepared_lengths(recipe_name: str, overrides: Sequence[str] = ()) -> Lengths:
    """Of a recipe's training split, from its index. SystemExit when it is not prepared."""
    from launch.inputs.dataset_index import read_index
    from launch.recipe.loading import find_recipe, load_recipe

    index = read_index(load_recipe(find_recipe(recipe_name), list(overrides)))
    if index is None:
        raise SystemExit(f"{recipe_name}: no index; run `samestep prepare {recipe_name}` first")
    train = index.splits["train"]
    return Lengths(train.text_tokens, train.visual_tokens, f"{len(train):,} of the index of {recipe_name}")


def main() -> None:
    """The table, then the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="take the lengths of this prepared recipe (default: drawn)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe value")
    parser.add_argument("--ranks", default="1,8,64,512", help="(default: 1,8,64,512)")
    parser.add_argument("--samples-per-rank", default="4,32", help="of a step (default: 4,32)")
    parser.add_argument("--steps", type=int, default=10, help="simulated for each (default: 10)")
    parser.add_argument(
        "--tflops",
        type=float,
        default=190.0,
        help="of a rank, recomputation not counted (default: 190, the default recipe's on one H100 at 4.40 s a step)",
    )
    parser.add_argument("--in-node", type=float, default=330.0, help="GB/s of an all-reduce (default: 330)")
    parser.add_argument(
        "--between-nodes", type=float, default=45.0, help="GB/s of an all-reduce (default: 45)"
    )
    options = parser.parse_args()
    lengths = prepared_lengths(options.recipe, options.set) if options.recipe else chart_lengths(28_299)
    network = Network(options.in_node * 1e9, options.between_nodes * 1e9)
    found = []
    for samples in map(int, options.samples_per_rank.split(",")):
        for ranks in map(int, options.ranks.split(",")):
            for assignment in ASSIGNMENTS:
                found.append(
                    simulate(
                        lengths,
                        ranks,
                        samples,
                        assignment,
                        steps=options.steps,
                        tflops=options.tflops,
                        network=network,
                    )
                )
                print(found[-1], file=sys.stderr, flush=True)
    report(lengths, found, options)


def report(lengths: Lengths, found: Sequence[Simulated], options: argparse.Namespace) -> None:
    """The table and the JSON line."""
    from rich.console import Console
    from rich.table import Table

    tokens = lengths.tokens
    title = (
        f"simulated: {lengths.source}, {tokens.mean():.0f} tokens a sample (longest {tokens.max()}), "
        f"{options.tflops:g} TFLOP/s a rank, all-reduce of {LORA_BYTES / 1e6:.1f} MB at {options.in_node:g} GB/s in a "
        f"node of 8 and {options.between_nodes:g} GB/s between nodes"
    )
    table = Table(title=title, title_justify="left")
    columns = (
        "samples a rank",
        "ranks",
        "assignment",
        "slowest / mean",
        "step / ideal",
        "lost to stragglers",
        "",
    )
    for column in (*columns[:-1], "to communication"):
        table.add_column(column, justify="left" if column == "assignment" else "right")
    for each in found:
        table.add_row(
            str(each.samples_per_rank),
            str(each.ranks),
            each.assignment,
            f"{each.slowest:.3f}",
            f"{each.step:.3f}",
            f"{each.straggler_share:.1%}",
            f"{each.communication_share:.2%}",
            end_section=each.assignment == ASSIGNMENTS[-1],
        )
    Console(width=120).print(table)
    facts = {"lengths": lengths.source, "mean_tokens": float(tokens.mean()), "tflops": options.tflops}
    print(json.dumps({**facts, "simulated": [asdict(each) for each in found]}))


if __name__ == "__main__":
    main()
