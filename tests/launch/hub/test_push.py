"""Uploads: the real client of the hub against a hub on loopback, by `samestep push` and beside a training."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch.checkpoints.manifest import read_manifest
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from tests.conftest import recipe_values
from tests.helpers.attempts import attempt
from tests.helpers.hub_server import TOKEN, Hub, hub_server
from tests.helpers.reported_run import evaluation_of
from trainer.export.model_card import adapter_card
from trainer.formats.portable import save_adapter
from trainer.pretrained import load_processor

SAMESTEP = str(Path(sys.executable).with_name("samestep"))
REPO = "owner/charts"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as server:
        yield server


@pytest.fixture(scope="module")
def recipe(world: Path) -> Recipe:
    return recipe_from_dict(recipe_values(world))


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run with an adapter, its processor and card, figures and an evaluation."""
    from tests.helpers.adapters import random_adapter

    run = RunDirectory(tmp_path_factory.mktemp("runs") / "first")
    attempt(run, recipe)
    save_adapter(random_adapter(recipe), run.adapter)
    load_processor(recipe).save_pretrained(str(run.adapter))
    base = recipe.model.name_or_path
    (run.adapter / "README.md").write_text(adapter_card(run, recipe, base, run.adapter))
    run.metrics_file.write_text('{"step": 1, "loss": 2.0}\n')
    run.environment_file.write_text(json.dumps({"python": "3.11", "versions": {"torch": "2.14"}}))
    run.eval_file().write_text(json.dumps(evaluation_of(20, 12)))
    return run


def call(hub: Hub, home: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **hub.environment(str(home / "hf")), "COLUMNS": "200", **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)


def push(hub: Hub, home: Path, run: RunDirectory, *options: str, **environment: str) -> tuple[int, str, str]:
    done = call(hub, home, SAMESTEP, "push", str(run.path), "--repo", REPO, *options, **environment)
    return done.returncode, done.stdout, done.stderr


def test_a_pushed_adapter_is_private_whole_and_loads_by_the_code_of_its_card(
    hub: Hub, run: RunDirectory, tmp_path: Path
) -> None:
    status, out, errors = push(hub, tmp_path, run)
    assert status == 0, errors
    assert f"uploaded: {hub.address}/{REPO}" in out
    repository = hub.repositories[REPO]
    assert repository.private
    here = {file.name: file.read_bytes() for file in run.adapter.iterdir() if file.name != "README.md"}
    assert {name: content for name, content in repository.files.items() if name in here} == here
    records = {"recipe.yaml", "plan.json", "metrics.jsonl", "eval.json"}
    assert {f"run/{name}" for name in records} <= repository.files.keys()
    card = repository.files["README.md"].decode()
    plan = json.loads(run.plan_file.read_text())
    for words in (
        plan["dataset_fingerprint"],
        "| base | adapter | +9 | -1 |",
        "| torch | 2.14 |",
        "| strategy | single |",
    ):
        assert words in card
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert f'"{REPO}"' in code
    # A third party's machine: another folder, an empty cache.
    shows = (
        "\nloaded = [value for name, value in model.named_parameters() if 'lora_B' in name]"
        "\nprint(sum(value.abs().sum().item() > 0 for value in loaded), processor.image_token)"
    )
    ran = call(hub, tmp_path / "theirs", sys.executable, "-c", code + shows)
    assert ran.returncode == 0, ran.stderr
    pairs = sum("lora_B" in name for name in load_file(run.adapter / "adapter_model.safetensors"))
    assert ran.stdout.split() == [str(pairs), "<|image_pad|>"]

    sent, commits = hub.received, len(repository.commits)
    assert push(hub, tmp_path, run)[0] == 0
    assert (hub.received, len(repository.commits)) == (sent, commits), "nothing has changed, nothing is sent"
    run.metrics_file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    assert push(hub, tmp_path, run)[0] == 0
    assert repository.commits[commits:] == [["run/metrics.jsonl"]]


def test_a_push_that_cannot_be_says_why_and_never_shows_the_token(
    hub: Hub, run: RunDirectory, tmp_path: Path
) -> None:
    wrong = call(hub, tmp_path, SAMESTEP, "push", str(run.path), "--repo", "x")
    refusals = {
        "no token": push(hub, tmp_path, run, HF_TOKEN=""),
        "HF_HUB_OFFLINE": push(hub, tmp_path, run, HF_HUB_OFFLINE="1"),
        "no merged model": push(hub, tmp_path, run, "--merged"),
        "401": push(hub, tmp_path, run, HF_TOKEN="hf_other"),
        "--repo": (wrong.returncode, wrong.stdout, wrong.stderr),
    }
    for reason, (status, _, errors) in refusals.items():
        assert status == 2, (reason, errors)
        assert reason in errors
        assert "Traceback" not in errors
        assert "hf_other" not in errors
    assert hub.repositories == {}
    hub.fail_with = 403
    status, _, errors = push(hub, tmp_path, run)
    assert (status, "403" in errors, TOKEN in errors) == (2, True, False)
    gone = push(hub, tmp_path, run, HF_ENDPOINT="http://127.0.0.1:9")
    assert gone[0] == 1
    assert "the same command tries again" in gone[2]
    assert "Traceback" not in gone[2]


@pytest.mark.long
def test_a_training_uploads_checkpoints_and_its_adapter_and_outlives_a_hub_that_is_gone(
    hub: Hub, recipe: Recipe, tmp_path: Path
) -> None:
    values = recipe.model_dump(mode="json")
    values["hub"] = {"push": True, "repo_id": REPO, "every_checkpoints": 1}
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe_from_dict(values)))
    runs = tmp_path / "runs"

    def train(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
        options = ["--name", name, "--runs-dir", str(runs), "--gpus-per-node", "1", "--strategy", "single"]
        return call(hub, tmp_path, SAMESTEP, "run", str(file), *options, **environment)

    refused = train("none", HF_TOKEN="")
    assert (refused.returncode, "hub.push" in refused.stderr) == (2, True)
    done = train("good")
    assert done.returncode == 0, done.stderr
    files = hub.repositories[REPO].files
    run = RunDirectory(runs / "good")
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights
    uploaded = json.loads(files["last-checkpoint/manifest.json"])
    assert uploaded == read_manifest(run.checkpoint(uploaded["facts"]["step"]), verify=True)
    assert f"last-checkpoint/{next(iter(uploaded['files']))}" in files
    gone = train("gone", HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.returncode == 0, gone.stderr
    assert (runs / "gone" / "DONE").is_file()
    assert (runs / "gone" / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert "samestep push" in gone.stderr
    written = [path.read_bytes() for path in runs.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not any(TOKEN.encode() in content for content in [*written, *files.values()])
