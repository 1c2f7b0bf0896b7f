"""samestep submit: what it refuses, writes, prints and queues."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.planning.plan import Plan
from launch.run.directory import RunDirectory, request_stop, write_marker
from launch.run.lock import hold_lock
from launch.slurm.attempts import read_ledger
from tests.helpers.attempts import save_step
from tests.helpers.fake_slurm import FakeSlurm, install
from tests.helpers.indexes import embedded_recipe
from tests.helpers.launcher import EMBEDDED, Launcher, samestep, stand_in, write_adapter

SUBMIT = ["submit", *EMBEDDED, "--nodes", "2", "--gpus-per-node", "4"]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Launcher:
    return stand_in(monkeypatch, tmp_path)


@pytest.fixture
def slurm(launcher: Launcher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeSlurm:
    """A login node without GPUs, with prepared data."""
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    return install(monkeypatch, tmp_path / "slurm")


def _run(name: str = "embedded") -> RunDirectory:
    return RunDirectory(Path("runs").absolute() / name)


def test_submit_writes_the_run_and_queues_its_script(
    slurm: FakeSlurm, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep(*SUBMIT, "--partition", "gpu", "--time", "1:00:00") == 0
    run = _run()
    plan = Plan.from_json(run.plan_file.read_text())
    assert (plan.strategy, plan.nodes, plan.gpus_per_node, plan.device) == ("ddp", 2, 4, "cuda")
    script = run.path / "submit.sbatch"
    assert slurm.calls("sbatch") == [f"--parsable {script}"]
    assert "#SBATCH --partition=gpu\n" in script.read_text()
    assert f"TARGET={run.path}\n" in script.read_text()
    assert (run.path / "logs").is_dir()
    assert read_ledger(run).job == "41"
    printed = capsys.readouterr().out
    assert script.read_text() in printed
    assert "8 (2 x 4 GPU)" in printed
    assert f"queued as job 41: {script}" in printed
    assert launcher.commands == []


def test_a_dry_run_prints_a_script_and_writes_nothing(
    launcher: Launcher, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert samestep(*SUBMIT, "--dry-run", "--then", "merge") == 0
    told = capsys.readouterr()
    assert told.out.startswith("#!/bin/bash\n")
    assert told.out.count("#!/bin/bash\n") == 2
    assert "8 (2 x 4 GPU)" in told.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_whether_the_run_is_done_or_where_it_would_go_on(
    slurm: FakeSlurm, launcher: Launcher, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*asked: str) -> str:
        capsys.readouterr()
        assert samestep(*SUBMIT, *asked, "--dry-run") == 0
        told = capsys.readouterr()
        assert told.out.startswith("#!/bin/bash\n")
        return told.err.splitlines()[-1]

    run = _run()
    assert told() == f"{run.path}: begins at step 0 of 6"
    launcher.saves = (3, 6)
    assert samestep("run", *EMBEDDED) == 0
    assert told().startswith(f"{run.path}: done already, step 6 of 6, adapter in {run.adapter}")
    assert "the older run is moved aside, and trained from step 0 to 6" in told("--fresh")
    more = ["--set", "training.max_steps=16", "--allow", "training.max_steps"]
    assert told(*more) == f"{run.path}: goes on from checkpoint-6, step 6 of 16"
    assert slurm.calls("sbatch") == []


def test_what_follows_waits_for_a_good_end(slurm: FakeSlurm) -> None:
    assert samestep(*SUBMIT, "--then", "evaluate,merge") == 0
    folder = _run().path
    assert slurm.calls("sbatch") == [
        f"--parsable {folder / 'submit.sbatch'}",
        f"--parsable --dependency=afterok:41 --kill-on-invalid-dep=yes {folder / 'merge.sbatch'}",
        f"--parsable --dependency=afterok:42 --kill-on-invalid-dep=yes {folder / 'evaluate.sbatch'}",
    ]
    assert (
        f"COMMAND=(evaluate {folder} --models 'base,adapter,merged')\n"
        in (folder / "evaluate.sbatch").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nodes", "0"], "--nodes: '0' cannot be; give a whole number, at least 1"),
        (["--nodes", "2,2"], "--nodes: 2 is there 2 times; give each once"),
        (["--nodes", "1,x"], "--nodes: 'x' cannot be; give a whole number"),
        (["--nodes", "1,40"], "batch.global_batch_size: a step has fewer samples than there are processes"),
        (["--nodes", "40"], "batch.global_batch_size: a step has fewer samples than there are processes"),
        (["--strategy", "single"], "--strategy: single is one process"),
        (["--strategy", ""], "--strategy: '' is none of single, ddp,"),
        (["--strategy", "other"], "--strategy: 'other' is none of single, ddp,"),
        (["--set", "lora.r=x"], "lora.r: "),
        (
            ["--set", "batch.micro_batch_tokens=20"],
            "batch.micro_batch_tokens: the longest sample does not fit",
        ),
        (["--device", "tpu"], "--device: 'tpu' is none of cuda, cpu"),
        (["--container", "x.sif"], "container.runtime: none although there is an image"),
        (["--time", "1:30"], "--time: 1:30 is over before the warning time begins (90 s <= 120 s)"),
        (["--signal-lead", "0"], "--signal-lead: "),
        (["--then", "merge,publish"], "--then: unknown publish; choose of merge, evaluate"),
        (["--partition", "a\nb"], "--partition: 'a\\nb' holds what is no character of a line"),
        (["--runs-dir", "a\nb"], "--runs-dir: "),
        (["--name", "$(id)"], "--name: '$(id)' is not a run name"),
        (["--site", "nothing.yaml"], "--site: nothing.yaml cannot be read"),
    ],
)
def test_a_wrong_request_is_refused_before_it_is_queued(
    arguments: list[str], problem: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep(*SUBMIT, *arguments) == 2
    told = capsys.readouterr().err
    assert problem in told
    assert "Traceback" not in told
    assert slurm.calls("sbatch") == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: invalid partition specified: nowhere",
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
    ],
)
def test_the_words_of_sbatch_are_passed_on(
    words: str, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("sbatch", f"echo '{words}' >&2; exit 1")
    assert samestep(*SUBMIT) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert words.removeprefix("sbatch: error: ") in told
    assert not _run().path.exists()


def test_a_job_that_may_be_queued_keeps_its_folder(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("sbatch", "echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1")
    assert samestep(*SUBMIT) == 2
    assert "Socket timed out); see `squeue` whether the job is there" in capsys.readouterr().err
    assert (_run().path / "submit.sbatch").exists()


def test_a_refused_job_does_not_take_an_older_run_away(slurm: FakeSlurm) -> None:
    assert samestep(*SUBMIT) == 0
    slurm.answer("sbatch", "exit 1")
    assert samestep(*SUBMIT) == 2
    assert _run().plan_file.exists()
    assert read_ledger(_run()).submitted == ("41",)


def test_without_sbatch_nothing_is_prepared(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert samestep(*SUBMIT) == 2
    assert capsys.readouterr().err == (
        "sbatch: not found in PATH, so this machine submits nothing; run this on the cluster's login node, "
        "or look at the script with --dry-run\n"
    )


def test_a_run_in_the_queue_is_not_queued_twice(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep(*SUBMIT) == 0
    slurm.answer("scontrol", "echo 'JobId=41 JobState=PENDING Reason=Priority'")
    assert samestep(*SUBMIT) == 2
    assert "job 41 of this run is in the queue already (pending)" in capsys.readouterr().err
    slurm.answer("scontrol", "echo 'JobId=41 JobState=FAILED Reason=NonZeroExitCode'")
    assert samestep(*SUBMIT) == 0


def test_a_job_is_queued_for_each_number_of_nodes(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", *EMBEDDED, "--gpus-per-node", "4", "--then", "merge,evaluate", "--doctor"]
    assert samestep(*words, "--nodes", "2,1,4") == 0
    script = _run().path / "submit.sbatch"
    assert slurm.calls("sbatch") == [
        f"--parsable {script}",
        f"--parsable --nodes=1 {script}",
        f"--parsable --nodes=4 {script}",
        "--parsable --dependency=afterok:41?afterok:42?afterok:43 --kill-on-invalid-dep=yes "
        f"{_run().path / 'merge.sbatch'}",
        f"--parsable --dependency=afterok:44 --kill-on-invalid-dep=yes {_run().path / 'evaluate.sbatch'}",
    ]
    book = read_ledger(_run())
    assert (book.job, book.alternatives, book.others_of("42")) == ("41", ("41", "42", "43"), ("41", "43"))
    assert book.others_of("50") == ()
    text = script.read_text()
    assert "\nSTAND_BY=900\n" in text
    assert "\nDOCTOR=yes\n" in text
    assert "#SBATCH --nodes=2\n" in text
    told = capsys.readouterr().out
    assert "or the same run on 1, 4 nodes: whichever job starts first" in told
    assert f"queued as job 43: {script} (4 nodes)" in told
    slurm.answer(
        "scontrol", "case $* in *43) echo 'JobId=43 JobState=PENDING Reason=Priority' ;; *) exit 1 ;; esac"
    )
    assert samestep(*words, "--nodes", "2") == 2
    assert "job 43 of this run is in the queue already (pending)" in capsys.readouterr().err
    slurm.answer("scontrol", "exit 1")
    assert samestep(*words, "--nodes", "2") == 0
    assert (read_ledger(_run()).alternatives, read_ledger(_run()).job) == ((), "46")
    assert "\nSTAND_BY=\n" in script.read_text()


def test_of_several_jobs_one_that_is_refused_leaves_those_before_it(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("sbatch", 'case $* in *--nodes=3*) echo "too many" >&2; exit 1 ;; *) echo 41 ;; esac')
    assert samestep(*SUBMIT, "--nodes", "2,3", "--then", "merge,evaluate") == 2
    told = capsys.readouterr().err
    assert "--nodes: 3: sbatch: refused submit.sbatch" in told
    assert (
        "queued already: submit.sbatch (2 nodes) as job 41; merge.sbatch, evaluate.sbatch: not queued" in told
    )
    folder, options = _run().path, "--kill-on-invalid-dep=yes"
    assert f"sbatch --dependency=afterok:41 {options} {folder / 'merge.sbatch'}, then" in told
    assert f"sbatch --dependency=afterok:ID {options} {folder / 'evaluate.sbatch'}" in told
    assert len(slurm.calls("sbatch")) == 2
    assert read_ledger(_run()).alternatives == ("41",)
    assert samestep(*SUBMIT, "--nodes", "2,3", "--name", "alone") == 2
    assert "by hand" not in capsys.readouterr().err


def test_a_run_under_way_here_is_not_queued(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep(*SUBMIT) == 0
    program = (
        "import sys; from pathlib import Path; from launch.run.lock import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(_run().path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert samestep(*SUBMIT) == 2
        other.communicate()
    assert "this run is under way" in capsys.readouterr().err


def test_a_finished_run_is_not_queued(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep(*SUBMIT) == 0
    run = _run()
    save_step(run, embedded_recipe("training.max_steps=6"), Plan.from_json(run.plan_file.read_text()), 6)
    write_adapter(run.adapter)
    write_marker(run, "DONE", "step 6")
    assert samestep(*SUBMIT) == 0
    assert "done already" in capsys.readouterr().out
    assert len(slurm.calls("sbatch")) == 1
    assert samestep(*SUBMIT, "--fresh") == 0
    assert len(slurm.calls("sbatch")) == 2


def test_submitting_forgets_what_was_asked_of_an_attempt_that_is_over(slurm: FakeSlurm) -> None:
    assert samestep(*SUBMIT) == 0
    request_stop(_run(), "user")
    write_marker(_run(), "STOPPED", "user: at step 1 of 6")
    assert samestep(*SUBMIT) == 0
    assert not _run().stop_file.exists()
    with hold_lock(_run().path):
        pass


def test_another_allocation_around_the_shell_is_not_passed_on(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    for name in ("SBATCH_ARRAY_INX", "SBATCH_EXPORT", "SBATCH_PARTITION", "SBATCH_WAIT", "SBATCH_NO_REQUEUE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SBATCH_ACCOUNT", "kept")  # the script leaves it open
    monkeypatch.setenv("SLURM_CONF", "kept")
    slurm.answer("sbatch", f"env >'{tmp_path}/environment'; echo 41")
    assert samestep(*SUBMIT, "--partition", "gpu") == 0
    environment = (tmp_path / "environment").read_text().splitlines()
    kept = [line for line in environment if line.startswith(("SLURM_", "SBATCH_"))]
    assert sorted(kept) == ["SBATCH_ACCOUNT=kept", "SLURM_CONF=kept"]


def test_more_cpus_than_a_node_has_are_refused_with_the_key_that_asks_for_them(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("sinfo", "printf '   16\\n24 \\n'")
    assert samestep(*SUBMIT, "--partition", "gpu") == 2
    assert capsys.readouterr().err == (
        "cpus_per_process: 8 x 4 processes are 32 CPUs of a node, and no node of partition gpu has more than "
        "24; set it to 6 in the site's file (--site)\n"
    )
    assert slurm.calls("sinfo") == ["--noheader --Node --partition=gpu --format=%c"]
    assert slurm.calls("sbatch") == []
    slurm.answer("sinfo", "echo 32")
    slurm.answer("sbatch", "echo 'sbatch: error: CPU count per node can not be satisfied' >&2; exit 1")
    assert samestep(*SUBMIT) == 2
    assert "(cpus_per_process: 8 x 4 processes are 32 CPUs of a node)" in capsys.readouterr().err


def test_how_often_a_job_may_crash_is_in_its_script(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep(*SUBMIT, "--max-crashes", "0") == 2
    assert "--max-crashes" in capsys.readouterr().err
    assert samestep(*SUBMIT, "--max-crashes", "7") == 0
    assert "\nMAX_CRASHES=7\n" in (_run().path / "submit.sbatch").read_text()


@pytest.mark.parametrize(
    ("site", "whose"),
    [
        ("container: {runtime: apptainer, image: a.sif}\n", "the container a.sif"),
        ("python: /opt/other/bin/python\n", "/opt/other/bin/python"),
    ],
)
def test_packages_that_are_not_this_pythons_are_left_to_the_job_to_judge(
    site: str,
    whose: str,
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("launch.rules.machine_rules.find_spec", lambda _: None)
    monkeypatch.setattr("launch.rules.machine_rules._installed", lambda: {"accelerate": "1.14.2"})
    words = [*SUBMIT, "--strategy", "zero3"]
    assert samestep(*words) == 2
    refused = capsys.readouterr().err
    assert "zero3 needs DeepSpeed" in refused
    assert "accelerate 1.14.2 < 1.15" in refused
    (tmp_path / "site.yaml").write_text(site)
    assert samestep(*words, "--site", "site.yaml") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"not judged here, the job runs with {whose}; its first node judges them" in said


def test_a_container_sees_the_caches_and_the_scratch_disk(
    slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without HF_HOME the default is meant; what is not there is not mounted: runtimes fail over that."""
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg" / "huggingface").mkdir(parents=True)
    site = tmp_path / "site.yaml"
    site.write_text("{scratch: /local, container: {runtime: pyxis, image: x}}")
    assert samestep(*SUBMIT, "--site", str(site), "--then", "merge") == 0
    home = tmp_path.resolve() / "xdg" / "huggingface"
    places = [_run().path.parent, tmp_path, home, "/local"]
    mounts = ",".join(f"{place}:{place}" for place in places)
    for script in ("submit.sbatch", "merge.sbatch"):
        text = (_run().path / script).read_text()
        assert f"'--container-mounts={mounts}'" in text
        assert f"HF_HOME={home}" in text
    (tmp_path / "cache").mkdir()
    assert samestep(*SUBMIT, "--site", str(site), "--name", "other") == 0
    assert f"{tmp_path / 'cache'}:" in (_run("other").path / "submit.sbatch").read_text()
