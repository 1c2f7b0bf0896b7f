"""The arithmetic of the benchmarks: what they say of a run is no better than this."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gpu_trace import (
    busy_seconds,
    exposed_seconds,
    host_syncs,
    read_events,
    top_kernels,
    union_seconds,
)
from benchmarks.multi_gpu_figures import (
    Measured,
    counted_steps,
    judge,
    like_for_like,
    row,
    shares_of_clocks,
    shares_of_trace,
)
from benchmarks.scaling import (
    Lengths,
    Network,
    all_reduce_seconds,
    chart_lengths,
    padded_costs,
    random_deal,
    rank_costs,
    simulate,
)
from benchmarks.throughput import parse
from launch.planning.load_balance import MicroBatch
from launch.planning.step_plan import cost


def _trace() -> list[dict[str, object]]:
    """A compute kernel from 0 to 10 us, NCCL from 5 to 20, a copy from 30 to 31, a second kernel from 18 to 19."""
    spans = [
        ("gemm", "kernel", 0, 10),
        ("ncclDevKernel_AllGather_RING_LL", "kernel", 5, 15),
        ("gemm", "kernel", 18, 1),
        ("Memcpy HtoD", "gpu_memcpy", 30, 1),
        ("nccl:all_gather", "gpu_user_annotation", 0, 40),
        ("cudaStreamSynchronize", "cuda_runtime", 2, 3),
        ("cudaLaunchKernel", "cuda_runtime", 0, 1),
    ]
    events: list[dict[str, object]] = [
        {"ph": "X", "name": name, "cat": kind, "ts": begin, "dur": length}
        for name, kind, begin, length in spans
    ]
    return [*events, {"ph": "M", "name": "process_name"}]


def test_a_trace_is_busy_where_something_runs_and_exposed_where_only_nccl_does() -> None:
    events = read_events({"traceEvents": _trace()})
    assert busy_seconds(events) == pytest.approx(21e-6)
    assert exposed_seconds(events) == pytest.approx(9e-6)  # 10 to 18 and 19 to 20
    assert host_syncs(events) == 1
    names = [(name, calls) for name, _, calls in top_kernels(events, 2)]
    assert names == [("ncclDevKernel_AllGather_RING_LL", 1), ("gemm", 2)]
    assert union_seconds([]) == 0


def test_shares_of_clocks_are_the_wait_for_the_last_rank_and_the_addition_after_it() -> None:
    fast = [{"ready": 8.0, "done": 10.5}, {"ready": 18.0, "done": 20.5}]
    slow = [{"ready": 10.0, "done": 10.5}, {"ready": 20.0, "done": 20.5}]
    waiting, adding = shares_of_clocks([fast, slow], [10.0, 10.0], [0, 1])
    assert waiting == pytest.approx(0.1)
    assert adding == pytest.approx(0.05)
    assert shares_of_trace([1.0, 3.0], 10.0) == pytest.approx((0.1, 0.1))


def test_steps_that_were_profiled_or_warmed_up_are_in_no_time() -> None:
    assert counted_steps(8, 0) == [2, 3, 4, 5, 6, 7]
    assert counted_steps(8, 4) == [2, 5, 6, 7]
    assert counted_steps(2, 0) == [1]
    assert counted_steps(0, 0) == []


def test_a_run_with_other_losses_or_samples_is_named() -> None:
    single = Measured("single", "single", 1, 32, "balanced", "DONE", losses=[2.0, 1.0], digests=["a", "b"])
    same = replace(single, name="ddp", strategy="ddp", processes=2, losses=[2.001, 1.0])
    assert judge(same, single) == []
    assert judge(replace(same, losses=[2.0, 1.003]), single) == ["losses 3.0e-03 from single"]
    assert judge(replace(same, digests=["a", "c"]), single) == ["other samples than single"]
    assert judge(replace(same, outcome="ended without a marker"), single) == ["ended without a marker"]


def test_a_run_is_compared_with_the_one_on_one_gpu_that_has_as_many_samples_a_step() -> None:
    single = Measured("single", "single", 1, 32, "balanced", "DONE", counted=[2])
    alike = replace(single, name="single-same", global_batch=8)
    few = replace(alike, name="ddp-few", strategy="ddp", processes=2)
    unfinished = replace(single, counted=[])
    assert like_for_like(few, [single, alike, few]) is alike
    assert like_for_like(few, [single, few]) is None  # another batch is no comparison
    assert like_for_like(single, [single, alike, few]) is None
    assert like_for_like(replace(few, global_batch=32), [unfinished]) is None


def test_efficiency_counts_the_tokens_that_all_gpus_take_a_second() -> None:
    single = Measured(
        "single", "single", 1, 32, "balanced", "DONE", seconds=[4.0], tokens=[100], counted=[0], losses=[1.0]
    )
    two = replace(single, name="ddp", processes=2, seconds=[2.5])
    assert row(two, single, single)[4] == "80.0%"
    wide = replace(two, global_batch=64, seconds=[5.0], tokens=[200])
    assert row(wide, None, single)[4] == "80.0% of single with 32"
    alike = replace(single, name="single-same", global_batch=64, seconds=[9.0], tokens=[200])
    assert row(wide, alike, single)[4] == "90.0%, 80.0% of single with 32"
    assert row(single, None, single)[4] == ""
    assert row(alike, None, single)[4] == "88.9% of single with 32"


def test_random_assignment_gives_every_rank_as_many_samples_and_each_once() -> None:
    tokens, costs = np.arange(100, 164), np.arange(64, dtype=np.float64)
    ranks = random_deal(np.arange(32), tokens, costs, 4, 10**9, 3)
    assert [sum(len(batch.samples) for batch in batches) for batches in ranks] == [8] * 4
    for batches in ranks:
        sizes = [int(tokens[list(batch.samples)].sum()) for batch in batches]
        assert max(sizes) - min(sizes) <= tokens[:32].max()
    assert sorted(sample for batches in ranks for batch in batches for sample in batch.samples) == list(
        range(32)
    )
    again = random_deal(np.arange(32), tokens, costs, 4, 10**9, 3)
    assert again == ranks
    few = random_deal(np.arange(4), tokens, costs, 4, 10**9, 2)
    assert [batch.filler for batch in few[0]] == [False, True]


def test_padding_costs_what_the_longest_of_four_costs() -> None:
    lengths = Lengths(np.array([100, 100, 100, 100, 100]), np.array([200, 300, 400, 500, 100]), "")
    dealt = [[MicroBatch((0, 1, 2, 3), filler=False), MicroBatch((4,), filler=False)]]
    alone = cost(lengths.text, lengths.visual)
    assert rank_costs(dealt, alone) == pytest.approx([alone.sum()])
    padded = cost([400, 300, 200, 100, 100], lengths.visual).sum()  # 600 tokens each, the fifth alone
    assert padded_costs(dealt, lengths) == pytest.approx([padded])


def test_balance_beats_chance_and_chance_beats_padding_in_the_simulation() -> None:
    lengths = chart_lengths(500)
    found = {
        way: simulate(lengths, 8, 4, way, steps=3, tflops=190) for way in ("random", "padded", "balanced")
    }
    assert found["balanced"].step < 1.05 < found["random"].step < found["padded"].step
    assert found["balanced"].straggler_share < 0.05 < found["random"].straggler_share
    alone = simulate(lengths, 1, 4, "balanced", steps=3, tflops=190)
    assert alone.step == pytest.approx(1.0)
    assert alone.communication_share == 0


def test_an_all_reduce_is_slower_between_nodes() -> None:
    network = Network(in_node=100e9, between_nodes=10e9, gpus_per_node=8)
    assert all_reduce_seconds(1e9, 1, network) == 0
    assert all_reduce_seconds(1e9, 8, network) == pytest.approx(2 * 7 / 8 * 1e9 / 100e9, rel=0.01)
    assert all_reduce_seconds(1e9, 16, network) > 9 * all_reduce_seconds(1e9, 8, network)


def test_the_side_swift_is_refused_in_one_sentence_where_its_python_has_no_ms_swift(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["throughput.py", "--sides", "swift", "--swift-python", "/no/such/python"]
    )
    with pytest.raises(SystemExit) as refused:
        parse()
    assert refused.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "--swift-python: /no/such/python has no ms-swift" in last
