"""The text of a job, and what Slurm's commands print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launch import launcher_variables
from launch.errors import ConfigError, RunError
from launch.local.accelerate_command import launch_command
from launch.planning.topology import Topology
from launch.resources import resource
from launch.run.directory import RunDirectory
from launch.slurm.output import (
    Nodes,
    QueuedJob,
    expand_nodes,
    parse_job,
    parse_job_id,
    parse_nodes,
    parse_queue,
    seconds_of,
)
from launch.slurm.sbatch import Job, allocation_options, doctor_script, follow_up_script, train_script
from launch.slurm.site import Site

GOLDEN = Path(__file__).parent / "golden"
TRAIN = resource("slurm", "train.sbatch").read_text()
AFTER = resource("slurm", "merge_eval.sbatch").read_text()
DOCTOR = resource("slurm", "doctor.sh").read_text()

SITE = {"partition": "gpu", "account": "project", "time": "24:00:00", "modules": ["cuda/12.8"]}
APPTAINER = {"runtime": "apptainer", "image": "/images/samestep.sif", "mounts": ["/data:/data:ro"]}
PYXIS = {
    "runtime": "pyxis",
    "image": "registry.example#team/samestep:1",
    "mounts": ["/data"],
    "python": "python3",
}


def job_of(
    nodes: int = 1, gpus: int = 1, device: str = "cuda", run: str = "/shared/runs/mine", **site: Any
) -> Job:
    chosen = Site.model_validate({**SITE, **site})
    return Job(
        "mine",
        nodes,
        gpus,
        device,
        Path(run),
        Path("/shared/work"),
        "/shared/venv/bin/python",
        chosen,
        mounts=("/shared/runs", "/shared/work"),
        environment={"SAMESTEP_CACHE": "/shared/cache"},
    )


CASES = {
    "1x1": job_of(),
    "1x8": job_of(1, 8, scratch="/local"),
    "4x8": job_of(4, 8, network_interface="ib0", environment={"NCCL_DEBUG": "WARN"}, gpu_type="h100"),
    "4x8_apptainer": job_of(4, 8, container=APPTAINER, scratch="/local"),
    "4x8_pyxis": job_of(4, 8, container=PYXIS),
    "2x4_cpu": job_of(2, 4, "cpu", cpus_per_process=2, memory="0", options=["--exclusive"]),
}


def check_with_shellcheck(text: str) -> None:
    """Where it is installed: `make test` installs nothing."""
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize("case", CASES)
def test_a_rendered_script_is_the_golden_file(case: str) -> None:
    """After a wanted change: SAMESTEP_GOLDEN=1 pytest tests/launch/slurm/test_sbatch.py, then read the difference."""
    text = train_script(TRAIN, CASES[case])
    golden = GOLDEN / f"{case}.sbatch"
    if os.environ.get("SAMESTEP_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    check_with_shellcheck(text)


@pytest.mark.parametrize(
    "words", [["merge", "/shared/runs/mine"], ["evaluate", "/shared/runs/mine", "--models", "base"]]
)
def test_a_follow_up_is_the_golden_file(words: list[str]) -> None:
    text = follow_up_script(AFTER, job_of(1, 8), words)
    golden = GOLDEN / f"{words[0]}.sbatch"
    if os.environ.get("SAMESTEP_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    check_with_shellcheck(text)


def test_a_look_at_nodes_is_the_golden_file_and_asks_salloc_for_what_the_site_says() -> None:
    job = job_of(4, 8, container=PYXIS, network_interface="ib0", gpu_type="h100", options=["--exclusive"])
    text = doctor_script(DOCTOR, job, ["--token", "t", "--shared", "/shared/a b", "--scratch", ""])
    golden = GOLDEN / "doctor.sh"
    if os.environ.get("SAMESTEP_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()
    check_with_shellcheck(text)
    assert "# EDIT" not in text
    assert allocation_options(job, 5) == [
        *("--job-name=mine", "--gpus-per-node=h100:8", "--cpus-per-task=64", "--time=5", "--partition=gpu"),
        *("--account=project", "--nodes=4", "--ntasks-per-node=1", "--exclusive"),
    ]
    with pytest.raises(ConfigError, match="--partition: "):
        allocation_options(job_of(partition="a\nb"), 5)


@pytest.mark.parametrize("template", [TRAIN, AFTER, DOCTOR])
def test_the_templates_are_clean_as_they_are(template: str) -> None:
    check_with_shellcheck(template)
    assert all(len(line) <= 120 for line in template.splitlines())


def test_every_line_to_edit_is_filled_or_left_out() -> None:
    for text in (train_script(TRAIN, job_of(4, 8)), follow_up_script(AFTER, job_of(), ["merge", "x"])):
        assert "# EDIT" not in text
    assert "--gpus-per-node" not in train_script(TRAIN, job_of(device="cpu"))


def test_the_template_starts_processes_as_the_launcher_does() -> None:
    """One thing is said in two places, in bash for who reads the template: they may not drift apart."""
    command = launch_command(
        Topology("ddp", 2, 4, "cuda"),
        config_file=Path("ddp.yaml"),
        module="trainer.train",
        module_args=[],
        port=1,
    )
    node = TRAIN[TRAIN.index("-m accelerate.commands.launch") : TRAIN.index("--marker-decides")]
    flags = {word for word in command if word.startswith("--")}
    # accelerate itself shows a traceback of a failed process without --quiet; `trainer.launcher` says how it ended.
    only_here = {"--tee", "--log", "--log_dir", "--run", "--quiet"}
    assert flags == {*re.findall(r"--[a-z_]+\b", node)} - only_here


def test_options_reach_sbatch_as_they_are() -> None:
    keys = ("partition", "account", "qos", "constraint", "memory")
    text = train_script(TRAIN, job_of(**dict.fromkeys(keys, 'a "b" $HOME `id` #x&y')))
    for option in (*keys[:-1], "mem"):
        assert f'#SBATCH --{option}="a \\"b\\" $HOME `id` #x&y"\n' in text
    assert '#SBATCH --output="/a%%b/r s/logs/%j.out"\n' in train_script(TRAIN, job_of(run="/a%b/r s"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"partition": "a\nb"}, "--partition"),
        ({"account": "a\\b"}, "--account"),
        ({"qos": "1\r"}, "--qos"),
        ({"options": ["--comment=a\nb"]}, "--comment"),
        ({"run": "/shared/a\nb"}, "--runs-dir"),
    ],
)
def test_what_an_sbatch_line_cannot_hold_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{named}: .* cannot stand in an #SBATCH line \('"):
        train_script(TRAIN, job_of(**change))


# what a node does with the text --------------------------------------------------------------

FACTS = "JobId=40 JobName=a JobState=RUNNING Requeue=1 Restarts=0 NodeList=n[1-2] TRES=cpu=2"
HOSTILE = "a b'c\"d$HOME`id`;e#f\\g*"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scontrol and srun of a cluster of one node, and a `python` that writes down how it was called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    _program(
        commands / "scontrol",
        'echo "$*" >>"$CALLS.scontrol"; case "$1 $2" in "show hostnames") echo n1 ;; "show job") echo "$FACTS" ;; esac',
    )
    _program(commands / "squeue", "echo '40 RUNNING 1'")
    _program(commands / "sinfo", "echo '4,4096,gpu:4,(null)|down*|n2'")
    _program(commands / "module", 'printf "%s\\0" "$@" >"$CALLS.module"')
    # The command alone: everything from the first word after srun's own options.
    _program(
        commands / "srun",
        'echo >>"$CALLS.steps"; printf "%s\\0" "$@" >"$CALLS.srun"\n'
        'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_NODEID=3 SLURMD_NODENAME=n4 exec "$@"',
    )
    _program(
        commands / "apptainer",
        'printf "%s\\0" "$@" >"$CALLS.apptainer"; while [ "$1" != IMAGE ]; do shift; done; shift; exec "$@"',
    )
    _program(
        tmp_path / "python",
        'printf "%s\\0" "$PWD" "$@" >"$CALLS.$2.$3"; env -0 >"$CALLS.environment"\n'
        'case "$3" in begin) printf "%s\\n" "$RUN_FOLDER" "ddp x.yaml" 4 ;; end) echo "$NEXT"; exit "${ENDS:-0}" ;;'
        " esac",
    )
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    for name, value in {
        "JOB_ID": "40",
        "JOB_NUM_NODES": "2",
        "JOB_NODELIST": "n[1-2]",
        "JOB_PARTITION": "batch",
        "CPUS_ON_NODE": "4",
        "NODEID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("FACTS", FACTS)
    monkeypatch.setenv("CALLS", str(tmp_path / "call"))
    monkeypatch.setenv("RUN_FOLDER", str(tmp_path / f"run {HOSTILE}".replace("/", "")))
    monkeypatch.setenv("NEXT", "requeue")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    return tmp_path


def _program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def _calls(cluster: Path, name: str) -> list[str]:
    return (cluster / f"call.{name}").read_text().split("\0")[:-1]


def _play(cluster: Path, job: Job) -> subprocess.CompletedProcess[str]:
    text = train_script(TRAIN, job)
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, timeout=60)


def _hostile_job(cluster: Path, **site: Any) -> Job:
    work = cluster / f"work {HOSTILE}\nsecond line"
    work.mkdir()
    values = {"environment": {"VALUE": HOSTILE + "\n", "OTHER": ""}, "modules": [], **site}
    job = job_of(2, 4, run=str(cluster / "run"), **values)
    return replace(job, work_folder=work, python=str(cluster / "python"))


def test_hostile_values_arrive_intact_and_no_secret_is_written(cluster: Path) -> None:
    scratch = str(cluster / f"scratch {HOSTILE}")
    job = _hostile_job(
        cluster, scratch=scratch, network_interface=HOSTILE, modules=[HOSTILE], grace_seconds=45
    )
    done = _play(cluster, job)
    assert done.returncode == 0, done.stderr
    assert _calls(cluster, "launch.slurm.job.begin")[0] == str(job.work_folder)
    begin = _calls(cluster, "launch.slurm.job.begin")[4:]
    told = ["--attempt", "40.0", "--max-crashes", "3", "--job", FACTS]
    told += ["--nodes", "4,4096,gpu:4,(null)|down*|n2"]
    assert begin == [
        *(str(job.run), *told, "--queue", "40 RUNNING 1", "--seen", "", "--device", "cuda", "--stand-by", "")
    ]
    end = _calls(cluster, "launch.slurm.job.end")[4:]
    assert end == [os.environ["RUN_FOLDER"], *told, "--asked", "", "--unfit", ""]
    launched = _calls(cluster, "accelerate.commands.launch.--config_file")
    flags = dict(pairwise(launched))
    assert flags["--config_file"] == "ddp x.yaml"
    assert (flags["--num_machines"], flags["--num_processes"], flags["--machine_rank"]) == ("2", "8", "3")
    assert (flags["--main_process_ip"], flags["--main_process_port"]) == ("n1", "10040")
    assert flags["--run-dir"] == os.environ["RUN_FOLDER"]
    environment = dict(entry.split("=", 1) for entry in _calls(cluster, "environment"))
    assert environment["VALUE"] == HOSTILE + "\n"
    assert environment["OTHER"] == ""
    expected = {
        "SAMESTEP_CACHE": "/shared/cache",
        "SAMESTEP_STOP_LEAD": "120",
        "NCCL_SOCKET_IFNAME": HOSTILE,
        "PET_RDZV_ID": "40.0",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "45",
        "HF_HUB_OFFLINE": "1",
    }
    assert environment.items() >= expected.items()
    assert "--cpus-per-task=4" in _calls(cluster, "srun")
    assert _calls(cluster, "module") == ["load", HOSTILE]
    assert (cluster / "call.scontrol").read_text().splitlines()[-1] == "requeue 40"
    assert "verysecret" not in done.stdout + done.stderr + train_script(TRAIN, job)


def test_an_image_gets_every_process(cluster: Path) -> None:
    mounts = [f"/data {HOSTILE}:/data"]
    done = _play(
        cluster, _hostile_job(cluster, container={"runtime": "apptainer", "image": "IMAGE", "mounts": mounts})
    )
    assert done.returncode == 0, done.stderr
    assert _calls(cluster, "apptainer")[:8] == [
        *("exec", "--nv", "--bind", "/shared/runs", "--bind", "/shared/work", "--bind", mounts[0])
    ]
    assert (cluster / "call.accelerate.commands.launch.--config_file").exists()


def test_a_step_is_told_its_image(cluster: Path) -> None:
    image, mounts = f"registry.example#{HOSTILE}", [f"/data {HOSTILE}"]
    done = _play(
        cluster, _hostile_job(cluster, container={"runtime": "pyxis", "image": image, "mounts": mounts})
    )
    assert done.returncode == 0, done.stderr
    told = dict(word.split("=", 1) for word in _calls(cluster, "srun") if word.startswith("--container"))
    places = "/shared/runs:/shared/runs,/shared/work:/shared/work"
    assert told == {
        "--container-image": image,
        "--container-mounts": f"{places},{mounts[0]}:{mounts[0]}",
    }


@pytest.mark.parametrize(("restart", "number"), [(0, 0), (1, 1), (4, 4), (5, 0)])
def test_attempts_in_a_row_train_in_steps_of_other_numbers(
    restart: int, number: int, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTS", FACTS.replace("Restarts=0", f"Restarts={restart}"))
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    assert (cluster / "call.steps").read_text().count("\n") == number + 1


def test_an_end_that_is_final_is_the_jobs_end(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXT", "")
    monkeypatch.setenv("ENDS", "2")
    assert _play(cluster, _hostile_job(cluster)).returncode == 2
    assert "requeue" not in (cluster / "call.scontrol").read_text()


def test_what_may_be_gone_later_puts_the_job_back_into_the_queue(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(cluster / "python", 'echo "$3" >>"$CALLS"; echo requeue')
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    assert (cluster / "call").read_text() == "begin\n"
    assert (cluster / "call.scontrol").read_text().splitlines()[-1] == "requeue 40"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ('[ "$2" = job ] || exit 1; echo "$FACTS"', "scontrol: does not name the nodes\n"),
        ('echo "${FACTS/40/41}"', "scontrol: does not know job 40\n"),
    ],
)
def test_without_the_nodes_names_or_the_jobs_facts_nothing_starts(
    script: str, told: str, cluster: Path
) -> None:
    _program(cluster / "bin" / "scontrol", script)
    done = _play(cluster, _hostile_job(cluster))
    assert (done.returncode, done.stderr) == (1, told)
    assert not list(cluster.glob("call.*"))


def test_a_task_of_an_array_speaks_of_itself_alone(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task of an array has the array's id, and whoever asks about that is told of all."""
    tasks = [f"JobId={40 + task} ArrayJobId=40 ArrayTaskId={2 - task} {FACTS[9:]}" for task in (1, 0)]
    monkeypatch.setenv("FACTS", "\n".join(tasks).replace("Restarts=0", "Restarts=1"))
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    begin = _calls(cluster, "launch.slurm.job.begin")
    assert begin[begin.index("--attempt") + 1] == "40_2.1"
    assert "\n" not in begin[begin.index("--job") + 1]
    said = (cluster / "call.scontrol").read_text().splitlines()
    assert (said[0], said[-1]) == ("show job -o 40", "requeue 40_2")
    launched = _calls(cluster, "accelerate.commands.launch.--config_file")
    assert launched[launched.index("--log_dir") + 1].endswith("/logs/40_2.1/node-3")


def test_jobs_by_the_thousand_fit_into_an_argument(cluster: Path) -> None:
    line = " ".join(word.ljust(width) for word, width in (("40", 60), ("RUNNING", 20), ("1", 20)))
    _program(cluster / "bin" / "squeue", f"for _ in {{1..3000}}; do echo '{line}'; done")
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    begin = _calls(cluster, "launch.slurm.job.begin")
    assert len(parse_queue(begin[begin.index("--queue") + 1])) == 3000


def test_nothing_of_another_job_around_the_shell_is_believed(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_another = {
        **{"SLURM_GPUS_PER_TASK": "2", "SLURM_MEM_PER_NODE": "100", "SLURM_RESTART_COUNT": "7"},
        **{"SLURM_ARRAY_JOB_ID": "39", "SLURM_ARRAY_TASK_ID": "1", "SLURM_HET_SIZE": "2", "SRUN_EXACT": "1"},
        **{"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS": "9", "SQUEUE_STATES": "PD", "PMI_RANK": "3"},
        **{"SBATCH_ARRAY_INX": "1-9", "SINFO_PARTITION": "x", "SLURM_EXPORT_ENV": "NONE"},
        **dict.fromkeys(launcher_variables._NAMES, "4"),
        **{"ACCELERATE_USE_FSDP": "true", "PET_NNODES": "9", "FSDP_VERSION": "2", "TORCHELASTIC_RUN_ID": "x"},
    }
    for name, value in of_another.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/etc/x")
    monkeypatch.setenv("SLURM_HINT", "nomultithread")
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    environment = dict(entry.split("=", 1) for entry in _calls(cluster, "environment"))
    assert not environment.keys() & of_another.keys()
    assert environment["SLURM_CONF"] == "/etc/x"
    assert environment["SLURM_HINT"] == "nomultithread"  # a step without it would get half of the cores
    assert (environment["JOB"], environment["RESTART"]) == ("40", "0")
    step = _calls(cluster, "srun")
    assert step[:3] == ["--export=ALL", "--input=none", "--cpus-per-task=4"]


def test_what_a_container_sets_of_the_step_does_not_reach_the_launcher(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enroot's hook for images with PyTorch (50-slurm-pytorch.sh): a single process would take it for its launcher."""
    srun = (cluster / "bin" / "srun").read_text()
    of_the_step = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=n1 MASTER_PORT=50000"
    _program(cluster / "bin" / "srun", srun.replace("SLURM_NODEID=3", f"SLURM_NODEID=3 {of_the_step}"))
    python = (cluster / "python").read_text()
    _program(cluster / "python", python.replace("esac", '*) env -0 >"$CALLS.launched" ;; esac'))
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    launched = {entry.partition("=")[0] for entry in _calls(cluster, "launched")}
    assert "PET_RDZV_ID" in launched
    assert not launched & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def test_gpus_of_this_job_are_kept(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("FACTS", f"{FACTS} TresPerNode=gres:gpu:8")
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    assert "SLURM_GPUS_ON_NODE=8" in _calls(cluster, "environment")


def test_failed_nodes_are_left_out_once_the_job_waits(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXT", "requeue exclude=n1,n2")
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    said = (cluster / "call.scontrol").read_text().splitlines()
    assert said[-2:] == ["requeue 40", "update JobId=40 ExcNodeList=n1,n2"]


def test_squeue_is_asked_again_for_the_jobs_that_decide(cluster: Path) -> None:
    _program(cluster / "bin" / "squeue", 'echo "$2" >>"$CALLS.squeue"; echo "41_2 RUNNING 1"')
    python = (cluster / "python").read_text()
    again = (
        'if [ "$3" = begin ] && mkdir "$CALLS.again" 2>/dev/null; then echo ask 41_2.0 41_2,40; exit; fi\n'
    )
    _program(cluster / "python", again + python.partition("\n")[2])
    assert _play(cluster, _hostile_job(cluster)).returncode == 0
    assert (cluster / "call.squeue").read_text() == "--me\n--jobs=41_2,40\n"
    begin = dict(pairwise(_calls(cluster, "launch.slurm.job.begin")))
    assert (begin["--queue"], begin["--seen"]) == ("41_2 RUNNING 1", "41_2.0")


def test_who_stands_by_goes_back_into_the_queue_for_a_while(cluster: Path) -> None:
    _program(cluster / "python", 'echo "$3" >>"$CALLS"; echo standby')
    job = replace(_hostile_job(cluster), one_of_several=True)
    assert _play(cluster, job).returncode == 0
    assert (cluster / "call").read_text() == "begin\n"
    said = (cluster / "call.scontrol").read_text().splitlines()
    assert said[-2:] == ["requeue 40", "update JobId=40 StartTime=now+900seconds"]


def test_the_jobs_that_wait_are_put_off_woken_and_cancelled(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(cluster / "bin" / "scancel", 'echo "$*" >>"$CALLS.scancel"')
    python = (cluster / "python").read_text()
    _program(cluster / "python", python.replace('"ddp x.yaml" 4', '"ddp x.yaml" 4 "41 42"'))
    job = replace(_hostile_job(cluster), one_of_several=True)
    monkeypatch.setenv("NEXT", "requeue exclude=n1 wake=41,42")
    assert _play(cluster, job).returncode == 0
    said = [
        line for line in (cluster / "call.scontrol").read_text().splitlines() if not line.startswith("show")
    ]
    off = [f"update JobId={number} StartTime=now+900seconds" for number in (41, 42)]
    awake = [f"update JobId={number} StartTime=now" for number in (41, 42)]
    assert said == [*off, "requeue 40", "update JobId=40 ExcNodeList=n1", *awake]
    monkeypatch.setenv("NEXT", "cancel=41,42")
    assert subprocess.run(["bash", "-c", train_script(TRAIN, job)], check=False, timeout=60).returncode == 0
    assert (cluster / "call.scancel").read_text() == "--state=PENDING 41 42\n"


@pytest.mark.parametrize("unfit", ["", "n2 n2: clock: 300 s ahead"])
def test_nodes_are_looked_at_before_they_train(
    unfit: str, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAID", unfit)
    run = cluster / "run"
    monkeypatch.setenv("RUN_FOLDER", str(run))
    python = (cluster / "python").read_text()
    _program(
        cluster / "python",
        python
        + 'case "$2" in launch.doctor.on_node) echo words ;; launch.doctor.in_job) echo "$SAID" ;; esac',
    )
    job = replace(
        _hostile_job(cluster, network_interface="ib0", scratch=str(cluster / "scratch")), doctor=True
    )
    assert _play(cluster, job).returncode == 0
    assert (run / "logs" / "40.0" / "doctor.txt").read_text() == "words\n"
    assert not list(run.glob(".doctor*"))
    look = dict(pairwise(_calls(cluster, "launch.doctor.on_node.--nodes")))
    assert (look["--nodes"], look["--head"], look["--port"], look["--processes"]) == ("2", "n1", "10040", "4")
    assert (look["--shared"], look["--interface"]) == (str(run / ".doctor-40.0"), "ib0")
    end = _calls(cluster, "launch.slurm.job.end")
    assert end[-2:] == ["--unfit", unfit]
    trained = (cluster / "call.accelerate.commands.launch.--config_file").exists()
    assert trained == (unfit == "")


@pytest.mark.parametrize("after", [False, True])
def test_the_scratch_folder_is_nobody_elses(
    after: bool, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = cluster / "scratch"
    scratch.mkdir()
    for name in ("samestep-40", "samestep-40-n4"):  # as somebody would who guesses
        (scratch / name).symlink_to(cluster)
    mine, another = scratch / "samestep-40-n4.left", scratch / "samestep-40.left"
    mine.mkdir()  # of an attempt that was killed
    another.mkdir()
    job = _hostile_job(cluster, scratch=str(scratch))
    text = follow_up_script(AFTER, job, ["merge", "x"]) if after else train_script(TRAIN, job)
    _program(
        cluster / "python",
        'case "$3" in begin) printf "%s\\n" "$RUN_FOLDER" ddp.yaml 4 ;; end) ;; '
        '*) echo "$TMPDIR" >"$CALLS.tmpdir"; stat -c %a "$TMPDIR" >"$CALLS.mode" ;; esac',
    )
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    used = Path((cluster / "call.tmpdir").read_text().strip())
    assert used.parent == scratch
    assert used.name.startswith("samestep-40." if after else "samestep-40-n4.")
    assert (cluster / "call.mode").read_text() == "700\n"
    assert not used.exists()
    assert (mine.exists(), another.exists()) == (after, not after)
    assert (scratch / "samestep-40").is_symlink()


def _signal(cluster: Path, name: str, kill: str, attempt: str = "40.0") -> tuple[RunDirectory, str]:
    """Play the script with a launcher that sends a signal, then waits for the file; (the run, what `end` was told)."""
    run = cluster / name
    run.mkdir()
    program = (
        'case "$3" in '
        f'begin) echo {attempt} >"{run}/.attempt"; printf "%s\\n" "{run}" ddp.yaml 4 ;; '
        f'end) echo "${{@: -3:1}}" >"{run}/asked" ;; '
        f'*) kill {kill}; for _ in 1 2 3 4 5 6 7 8 9 10; do [ ! -e "{run}/STOP" ] || exit 0; sleep 0.1; done; esac'
    )
    _program(cluster / "python", program)
    job = replace(job_of(run=str(run), modules=[]), work_folder=cluster, python=str(cluster / "python"))
    text = "export BATCH=$$\n" + train_script(TRAIN, job)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return RunDirectory(run), (run / "asked").read_text().strip()


@pytest.mark.parametrize(("number", "reason"), [("USR1", "time"), ("TERM", "preempted")])
def test_a_signal_becomes_a_file(number: str, reason: str, cluster: Path) -> None:
    run, asked = _signal(cluster, "run", f'-{number} "$BATCH"')
    assert (run.stop_file.read_text(), asked) == (f"{reason}\n", reason)


def test_a_term_to_a_nodes_first_process_alone_becomes_a_file_too(cluster: Path) -> None:
    """All that a preemption with a GraceTime sends. It is no word of the job's script: a rank that died sends it."""
    run, asked = _signal(cluster, "run", '-TERM "$PPID"')
    assert (run.stop_file.read_text(), asked) == ("preempted\n", "")


@pytest.mark.parametrize("kill", ['-TERM "$BATCH"', '-TERM "$PPID"'])
def test_a_term_that_comes_after_another_attempt_has_begun_does_not_stop_that(
    kill: str, cluster: Path
) -> None:
    run, _ = _signal(cluster, "run", kill, attempt="40.1")
    assert not run.stop_file.exists()


# what Slurm prints ------------------------------------------------------------------------------


def test_job_ids_are_read_among_warnings() -> None:
    assert parse_job_id("12\n") == "12"
    assert parse_job_id("sbatch: warning: slow today\n12;alps\n") == "12"
    with pytest.raises(RunError, match="sbatch: printed no job id"):
        parse_job_id("Submitted batch job\n")


def test_a_jobs_facts_are_read() -> None:
    printed = (
        "JobId=9 JobName=a b JobState=COMPLETING Reason=TimeLimit Dependency=(null) Requeue=1 Restarts=2 "
        "TimeLimit=00:01:00 StartTime=2026-11-25T09:57:25 StdOut=/a b/9.out"
    )
    facts = parse_job(printed, "9")
    assert facts is not None
    assert (facts.state, facts.reason, facts.restarts, facts.requeueable) == (
        "COMPLETING",
        "TimeLimit",
        2,
        True,
    )
    assert (facts.excluded, facts.asks_for_nodes, facts.heterogeneous) == ((), False, False)
    assert parse_job("slurm_load_jobs error: Invalid job id specified", "9") is None
    assert parse_job(printed, "8") is None


def test_of_an_array_or_a_job_of_parts_the_one_meant_is_read() -> None:
    printed = (
        "JobId=8 ArrayJobId=7 ArrayTaskId=0 JobState=CANCELLED Restarts=0\n"
        "JobId=7 ArrayJobId=7 ArrayTaskId=1 JobState=RUNNING Restarts=2 ExcNodeList=n[3-4] Reservation=course\n"
    )
    found = {job: parse_job(printed, job) for job in ("7_0", "7_1", "8", "7")}
    assert {job: facts and facts.state for job, facts in found.items()} == {
        **{"7_0": "CANCELLED", "8": "CANCELLED", "7_1": "RUNNING", "7": "RUNNING"}
    }
    assert found["7_1"] is not None
    assert (found["7_1"].excluded, found["7_1"].asks_for_nodes) == (("n3", "n4"), True)
    part = parse_job("JobId=5 HetJobId=5 HetJobOffset=0 JobState=RUNNING", "5")
    assert part is not None
    assert part.heterogeneous


def test_queue_and_nodes_are_read() -> None:
    queue = "7                   RUNNING             1                   \n8   PENDING  0\nslurm_load_jobs error\n"
    assert parse_queue(queue) == [QueuedJob("7", "RUNNING", True), QueuedJob("8", "PENDING", False)]
    printed = "4,4096,gpu:4,a|b|mixed|n1\n8,1,(null),(null)|down*|n[2-3]\nslurm_load_node error\n"
    nodes = parse_nodes(printed)
    assert nodes == [
        Nodes("4,4096,gpu:4,a|b", "mixed", ("n1",)),
        Nodes("8,1,(null),(null)", "down*", ("n2", "n3")),
    ]
    states = ["mixed", "idle~", "down*", "down", "allocated*", "draining", "failing", "reserved"]
    found = [Nodes("", state, ()) for state in states]
    assert [(one.in_use, one.dead) for one in found] == [
        *[(True, False)] * 2,
        *[(False, True)] * 3,
        *[(False, False), (False, True), (False, False)],
    ]


@pytest.mark.parametrize(
    ("names", "nodes"),
    [
        ("", []),
        ("(null)", []),
        ("n1", ["n1"]),
        ("n[1-3,07],gpu2", ["n1", "n2", "n3", "n07", "gpu2"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]n[3-4]x", ["r1n3x", "r1n4x", "r2n3x", "r2n4x"]),
    ],
)
def test_lists_of_nodes_are_read_as_slurm_writes_them(names: str, nodes: list[str]) -> None:
    assert expand_nodes(names) == nodes
    assert len(expand_nodes("n[0-999999999999][0-99999]")) <= 65536


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:02:03", 3723),
        ("2-3", 183600),
        ("1-0:1", 86460),
        ("1-1:1:1", 90061),
        ("x", None),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds
