"""The wheel works outside the repository: recipes and configurations travel with it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked, as the only place Python finds launch and trainer."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
    ]
    subprocess.run([*build, REPOSITORY], check=True, cwd=folder)
    (wheel,) = folder.glob("samestep-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_outside(unpacked: Path, tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_answers_outside_the_repository(unpacked: Path, tmp_path: Path) -> None:
    done = run_outside(unpacked, tmp_path, "-m", "launch.cli.main", "plan", "--help")
    assert done.returncode == 0, done.stderr
    assert "samestep plan" in done.stdout


def test_recipes_and_configurations_are_found_outside_the_repository(unpacked: Path, tmp_path: Path) -> None:
    program = (
        "from launch.recipe.loading import find_recipe, load_recipe; from launch.resources import resource\n"
        "print(find_recipe('recipes/notebook.yaml')); print(load_recipe(find_recipe('embedded')).name)\n"
        "print(resource('accelerate_configs', 'ddp.yaml'))\n"
    )
    done = run_outside(unpacked, tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    recipe, name, config = done.stdout.split()
    assert Path(recipe) == unpacked / "launch/share/recipes/notebook.yaml"
    assert Path(config) == unpacked / "launch/share/accelerate_configs/ddp.yaml"
    assert name == "embedded"


def test_every_shipped_file_of_the_repository_is_in_the_wheel(unpacked: Path) -> None:
    for kind in ("recipes", "accelerate_configs", "ds_configs", "slurm"):
        here = {file.name for file in (REPOSITORY / kind).glob("*") if file.is_file()}
        there = {file.name for file in (unpacked / "launch/share" / kind).glob("*")}
        assert there == here, kind


def test_the_page_of_the_report_is_in_the_wheel(unpacked: Path) -> None:
    pages = {file.name for file in (REPOSITORY / "launch/report/page").iterdir()}
    assert {file.name for file in (unpacked / "launch/report/page").iterdir()} == pages
    assert len(pages) == 3


def test_a_wrong_recipe_is_two_lines_and_status_two(unpacked: Path, tmp_path: Path) -> None:
    done = run_outside(
        unpacked,
        tmp_path,
        "-m",
        "launch.cli.main",
        "plan",
        "embedded",
        "--set",
        "lora.r=x",
        "--set",
        "loar.r=1",
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["lora.r", "loar"]
