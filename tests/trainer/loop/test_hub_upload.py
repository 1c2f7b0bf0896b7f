"""What a training uploads beside itself, and that no answer of the hub reaches it."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.recipe.loading import recipe_from_dict
from launch.run.directory import RunDirectory
from tests.helpers.attempts import attempt, save_step
from tests.helpers.hub_server import TOKEN, hub_server
from tests.helpers.launcher import write_adapter
from trainer.loop import hub_upload
from trainer.loop.hub_upload import CheckpointUpload, upload_final

REPO = "owner/charts"


def test_every_nth_checkpoint_and_the_adapter_are_uploaded_and_a_failure_is_one_warning(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.conftest import recipe_values

    hub_values = {"push": True, "repo_id": REPO, "every_checkpoints": 2}
    recipe = recipe_from_dict({**recipe_values(world), "hub": hub_values})
    run = RunDirectory(tmp_path / "run")
    plain = recipe_from_dict(recipe_values(world))
    plan = attempt(run, plain)  # planning would ask for a token
    with hub_server() as hub:
        for name, value in hub.environment(str(tmp_path / "hf")).items():
            monkeypatch.setenv(name, value)
        callback = CheckpointUpload(run, recipe)
        for step in (3, 6, 9, 12):
            save_step(run, plain, plan, step)
            callback.on_save(None, SimpleNamespace(global_step=step), None)
            if callback._child is not None:
                assert callback._child.wait(timeout=60) == 0, (run.path / "logs/hub.log").read_text()
        files = hub.repositories[REPO].files
        assert files["last-checkpoint/manifest.json"] == (run.checkpoint(12) / "manifest.json").read_bytes()
        assert len(hub.repositories[REPO].commits) == 2
        write_adapter(run.adapter)
        with caplog.at_level(logging.INFO, "trainer"):
            upload_final(run, recipe)
        assert files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
        assert "uploaded to" in caplog.text
    caplog.clear()
    upload_final(run, recipe)  # the hub is gone
    assert f"samestep push {run.path} --repo {REPO}" in caplog.text
    log = (run.path / "logs" / "hub.log").read_text()
    assert "the same command tries again" in log
    assert TOKEN not in log


def test_an_upload_that_hangs_is_ended_and_no_second_one_is_started_beside_it(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import subprocess
    import sys

    from tests.conftest import recipe_values

    recipe = recipe_from_dict(
        {**recipe_values(world), "hub": {"push": True, "repo_id": REPO, "every_checkpoints": 1}}
    )
    started: list[subprocess.Popen[bytes]] = []

    def hang(*_: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    monkeypatch.setattr(hub_upload, "start_upload", hang)
    monkeypatch.setattr(hub_upload, "FINAL_PATIENCE_S", 0.2)
    run = RunDirectory(tmp_path)
    callback = CheckpointUpload(run, recipe)
    for step in (1, 2):
        callback.on_save(None, SimpleNamespace(global_step=step), None)
    assert len(started) == 1
    assert "checkpoint 2 is not uploaded" in caplog.text
    upload_final(run, recipe)
    assert started[1].wait(timeout=10) != 0
    assert "not uploaded" in caplog.text
    started[0].kill()
    started[0].wait()
