"""The chain of a run, link by link."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launch.audit import verify
from launch.audit.verify import verify_run
from launch.checkpoints.adapter_file import read_digest
from launch.planning.step_plan import SampleStream
from launch.run.directory import RunDirectory
from launch.run.proof import chained, proof_of, proof_table
from tests.helpers.attempts import INDEX, attempt, recipe_of
from tests.helpers.launcher import samestep

OLD_RUN = Path(__file__).parents[2] / "data" / "run_of_c54213f" / "straight"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))  # the user's own may hold the run's data
    return RunDirectory(Path(shutil.copytree(OLD_RUN, tmp_path / "run")))


def states(run: RunDirectory) -> dict[str, str]:
    return {link.name: link.state for link in verify_run(run)}


def test_a_whole_run_holds_where_neither_data_nor_base_is(run: RunDirectory) -> None:
    assert states(run) == {
        "data": "not checked",
        "plan": "ok",
        "steps": "not checked",
        "checkpoint-6": "ok",
        "adapter": "ok",
    }


def test_a_run_that_began_with_another_ones_checkpoint_holds_from_there_on(run: RunDirectory) -> None:
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[2:]))
    assert states(run)["steps"] == "failed"
    plan = json.loads(run.plan_file.read_text())
    run.plan_file.write_text(json.dumps(plan | {"started_from": "/runs/other/checkpoint-2"}))
    (steps,) = (link for link in verify_run(run) if link.name == "steps")
    assert steps.state == "not checked"
    assert "from step 3 on (the earlier ones are those of /runs/other/checkpoint-2)" in steps.text
    run.metrics_file.write_text("".join([*lines[2:3], *lines[4:]]))
    assert states(run)["steps"] == "failed"


@pytest.mark.parametrize("kept", [0, 4])
def test_steps_that_a_checkpoint_or_the_end_has_and_the_metrics_have_not_fail(
    run: RunDirectory, kept: int
) -> None:
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:kept]))
    (steps,) = (link for link in verify_run(run) if link.name == "steps")
    assert (steps.state, steps.text) == ("failed", f"metrics.jsonl ends at step {kept}, the run has taken 6")


def test_what_was_altered_is_the_link_that_fails(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run.adapter / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert states(run)["adapter"] == "failed"
    run.recipe_file.write_text(run.recipe_file.read_text().replace("lora_alpha: 16", "lora_alpha: 17"))
    assert states(run)["plan"] == "failed"
    state = run.checkpoint(6) / "trainer_state.json"
    state.write_text(state.read_text() + " ")
    assert states(run)["checkpoint-6"] == "failed"
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:2] + lines[3:]))
    assert states(run)["steps"] == "failed"
    assert samestep("verify", str(run.path)) == 1
    assert "failed" in capsys.readouterr().out
    assert "the first is 3" in next(link.text for link in verify_run(run) if link.name == "steps")


def test_a_merge_and_an_evaluation_of_another_adapter_fail(run: RunDirectory) -> None:
    run.merged.mkdir()
    (run.merged / "merge.json").write_text('{"adapter_sha256": "0"}')
    run.eval_file().write_text('{"weights": {"adapter": "0"}, "questions": 3}')
    assert states(run) | {"merged": "failed", "eval.json": "failed"} == states(run)


def test_an_evaluation_that_cannot_be_read_fails_and_an_older_one_is_not_checked(run: RunDirectory) -> None:
    (run.path / "eval-validation-8.json").write_text('{"weights": {')
    run.eval_file().write_text('{"questions": 3}')
    links = {link.name: link for link in verify_run(run)}
    assert links["eval.json"].state == "not checked"
    damaged = links["eval-validation-8.json"]
    assert (damaged.state, "`samestep evaluate` writes it anew" in damaged.text) == ("failed", True)


def test_a_cut_adapter_fails_with_what_brings_it_back_and_what_hangs_on_it_is_not_judged(
    run: RunDirectory,
) -> None:
    weights = run.adapter / "adapter_model.safetensors"
    (run.adapter / "README.md").write_text(proof_table(proof_of(run, read_digest(run.adapter))))
    assert states(run)["card of adapter"] == "ok"
    run.merged.mkdir()
    (run.merged / "merge.json").write_text(json.dumps({"adapter_sha256": read_digest(run.adapter)}))
    run.eval_file().write_text('{"weights": {"adapter": "0"}, "questions": 3}')
    weights.write_bytes(weights.read_bytes()[:-1])
    links = {link.name: link for link in verify_run(run)}
    assert links["adapter"].state == "failed"
    assert "`samestep run` command writes it again from checkpoint-6" in links["adapter"].text
    assert {links[name].state for name in ("merged", "eval.json", "card of adapter")} == {"not checked"}
    assert not any("anew" in link.text for link in links.values())


def test_every_step_is_held_against_the_plan_where_the_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recipe = RunDirectory(tmp_path / "run"), recipe_of()
    run.path.mkdir()
    plan = replace(attempt(run, recipe), samples_digest="content")
    run.plan_file.write_text(plan.to_json())
    train = replace(INDEX.splits["train"], digests=tuple(bytes([sample]) * 32 for sample in range(50)))
    index = replace(INDEX, splits={**INDEX.splits, "train": train})
    monkeypatch.setattr(verify, "read_index", lambda _: index)

    def digest(step: int) -> str:
        samples = SampleStream(
            n=50, global_batch_size=8, seed=recipe.training.seed, fingerprint=INDEX.fingerprint
        ).samples(step - 1)
        rows = sorted(train.digests[sample] for sample in samples)
        return hashlib.sha256(b"".join(rows)).hexdigest()[:16]

    digests = [digest(step) for step in (1, 2, 3)]
    lines = [
        json.dumps({"step": step, "samples_digest": each}) + "\n" for step, each in enumerate(digests, 1)
    ]
    run.metrics_file.write_text("".join(lines))
    steps = next(link for link in verify_run(run) if link.name == "steps")
    assert steps.state == "ok", steps.text
    assert chained(digests)[:12] in steps.text
    run.metrics_file.write_text("".join(lines).replace(digests[1], digests[0]))
    steps = next(link for link in verify_run(run) if link.name == "steps")
    assert (steps.state, "step 2 trained on other samples" in steps.text) == ("failed", True)


def test_json_lists_the_links(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep("verify", str(run.path), "--json") == 0
    assert [link["name"] for link in json.loads(capsys.readouterr().out)][:3] == ["data", "plan", "steps"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep("verify", str(tmp_path)) == 2
    assert "no such run" in capsys.readouterr().err
