"""The proof in the card of a downloaded adapter or merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launch.audit.verify import verify_run
from launch.audit.verify_folder import verify_folder
from launch.checkpoints.adapter_file import read_digest
from launch.run.directory import RunDirectory
from launch.run.proof import parse_proof, proof_of, proof_table
from tests.helpers.launcher import samestep

OLD_RUN = Path(__file__).parents[2] / "data" / "run_of_c54213f" / "straight"


@pytest.fixture
def downloaded(tmp_path: Path) -> tuple[RunDirectory, Path]:
    """A run whose adapter has a card, and the adapter as the hub has it."""
    run = RunDirectory(Path(shutil.copytree(OLD_RUN, tmp_path / "run")))
    digest = read_digest(run.adapter)
    run.eval_file().write_text(json.dumps({"weights": {"adapter": digest}, "questions": 3}))
    (run.adapter / "README.md").write_text(f"# mine\n\n{proof_table(proof_of(run, digest))}\n\nmore\n")
    folder = Path(shutil.copytree(run.adapter, tmp_path / "downloaded"))
    (folder / "run").mkdir()
    for name in ("plan.json", "metrics.jsonl", "eval.json"):
        shutil.copyfile(run.path / name, folder / "run" / name)
    return run, folder


def states(folder: Path) -> dict[str, str]:
    return {link.name: link.state for link in verify_folder(folder)}


def test_a_downloaded_adapter_holds_against_its_card(downloaded: tuple[RunDirectory, Path]) -> None:
    run, folder = downloaded
    assert states(folder) == dict.fromkeys(("chain", "data", "plan", "steps", "adapter", "evaluation"), "ok")
    assert {link.name: link.state for link in verify_run(run)}["card of adapter"] == "ok"
    shutil.rmtree(folder / "run")
    assert states(folder) | {"plan": "not checked", "steps": "not checked", "adapter": "ok"} == states(folder)
    assert samestep("verify", str(folder)) == 0


def test_whatever_was_altered_is_named(
    downloaded: tuple[RunDirectory, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = downloaded
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    metrics = folder / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"samples_digest": "', '"samples_digest": "0', 1))
    (folder / "run" / "eval.json").write_text('{"questions": 4}')
    failed = {name for name, state in states(folder).items() if state == "failed"}
    assert failed == {"steps", "adapter", "evaluation"}
    assert samestep("verify", str(folder)) == 1
    assert "in the card" in capsys.readouterr().out
    card = folder / "README.md"
    first, second, *_ = parse_proof(card.read_text())
    card.write_text(card.read_text().replace(first.digest, second.digest))
    assert states(folder)["chain"] == "failed"
    (run.adapter / "README.md").write_text(card.read_text())
    assert {link.name: link.state for link in verify_run(run)}["card of adapter"] == "failed"


def test_a_merged_model_names_the_adapter_that_it_is_of(
    downloaded: tuple[RunDirectory, Path], tmp_path: Path
) -> None:
    run, _ = downloaded
    digest = read_digest(run.adapter)
    merged = tmp_path / "merged-download"
    merged.mkdir()
    record = {"adapter_sha256": digest, "changed": 2, "tensors": 4}
    (merged / "merge.json").write_text(json.dumps(record))
    shutil.copyfile(run.adapter / "adapter_model.safetensors", merged / "model.safetensors")
    (merged / "README.md").write_text(proof_table(proof_of(run, digest, record)))
    assert states(merged) | {"merge": "ok", "adapter": "ok", "chain": "ok"} == states(merged)
    (merged / "merge.json").write_text(json.dumps(record | {"adapter_sha256": "0"}))
    assert states(merged) | {"merge": "failed", "adapter": "failed"} == states(merged)


def test_a_folder_without_a_proof_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("# no proof\n")
    assert samestep("verify", str(tmp_path)) == 2
    assert "no such run" in capsys.readouterr().err
