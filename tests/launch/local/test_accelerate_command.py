"""The command line of `accelerate launch`, as golden lists."""

import socket
from pathlib import Path

import pytest

from launch.local.accelerate_command import cpu_threads_of, free_port, launch_command
from launch.planning.make_plan import make_plan
from launch.planning.topology import Topology
from tests.helpers.indexes import embedded_recipe, make_index

CONFIG = Path("/configs/with space/ddp.yaml")


def test_one_node() -> None:
    plan = make_plan(embedded_recipe(), make_index(), Topology("ddp", 1, 2, "cuda"))
    command = launch_command(
        plan,
        config_file=CONFIG,
        module="trainer.train",
        module_args=["--run-dir", "runs/a b"],
        port=4711,
        python="python",
    )
    assert command == [
        *("python", "-m", "trainer.launcher"),
        *("--config_file", "/configs/with space/ddp.yaml"),
        *("--num_machines", "1", "--num_processes", "2"),
        *("--machine_rank", "0", "--main_process_ip", "127.0.0.1", "--main_process_port", "4711"),
        *("--module", "trainer.train", "--run-dir", "runs/a b"),
    ]


def test_the_second_of_four_nodes() -> None:
    plan = make_plan(embedded_recipe(), make_index(), Topology("ddp", 4, 8, "cuda"))
    command = launch_command(
        plan,
        config_file=CONFIG,
        module="trainer.train",
        module_args=[],
        port=29500,
        machine_rank=1,
        main_process_ip="10.0.0.7",
        cpu_threads=3,
        python="python",
    )
    assert command[5:] == [
        *("--num_machines", "4", "--num_processes", "32"),  # the total, not the number on a node
        *("--machine_rank", "1", "--main_process_ip", "10.0.0.7", "--main_process_port", "29500"),
        *("--num_cpu_threads_per_process", "3", "--module", "trainer.train"),
    ]


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_processes_share_the_cores_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))

    def threads(device: str, gpus_per_node: int) -> int | None:
        plan = make_plan(embedded_recipe(), make_index(), Topology("ddp", 1, gpus_per_node, device))
        return cpu_threads_of(plan)

    assert (threads("cpu", 2), threads("cpu", 3), threads("cpu", 16), threads("cuda", 2)) == (4, 2, 1, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads("cpu", 2) is None
