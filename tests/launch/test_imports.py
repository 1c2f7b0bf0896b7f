"""The launcher starts without the libraries of the trainer, and fast."""

import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

MODULES = sorted(".".join(file.with_suffix("").parts) for file in Path("launch").rglob("[a-z]*.py"))
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "trainer")
SAMESTEP = Path(sys.executable).with_name("samestep")


def loaded_by(program: str) -> set[str]:
    check = f"{program}\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_no_module_of_the_launcher_loads_a_library_of_the_trainer() -> None:
    assert len(MODULES) > 50
    assert loaded_by("\n".join(f"import {module}" for module in MODULES)) == set()


def test_the_command_line_loads_nothing_of_substance_before_a_command_runs() -> None:
    program = "import launch.cli.main, sys; print(*[n for n in ('numpy', 'pydantic', 'pyarrow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_reading_the_prepared_data_does_without_pandas(tmp_path: Path) -> None:
    numbers = "row", "text_tokens", "visual_tokens", "target_tokens", "human_or_machine", "prefix_tokens"
    columns = {**{name: [3, 1] for name in numbers}, "digest": [b"a", b"b"]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    program = (
        "import sys; from pathlib import Path; from launch.inputs.dataset_index import _read_split\n"
        f"split = _read_split(Path({str(tmp_path / 'train.parquet')!r}).read_bytes())\n"
        "print('pandas' in sys.modules, split.tokens.dtype, *split.tokens)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "int64", "6", "2"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_costs_less_than_half_a_second_of_processor_time(arguments: list[str]) -> None:
    """Processor time, not the clock, and the least of several: neighbours on the machine only ever add to both."""
    assert min(processor_seconds([str(SAMESTEP), *arguments]) for _ in range(5)) < 0.5


def processor_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_import_contracts_hold() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
