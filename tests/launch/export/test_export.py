"""`samestep export`: what a loader needs is there, or every lack is named; GGUF by llama.cpp's converter."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.run.directory import RunDirectory
from tests.helpers.launcher import samestep
from tests.helpers.reported_run import reported_run

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "visual.merger.mlp.0.weight",
    "lm_head.weight",
)


def write_weights(folder: Path, *names: str) -> None:
    save_file({name: np.zeros(2, np.float32) for name in names}, folder / "model.safetensors")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run whose merged model is complete."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    run = reported_run(tmp_path / "runs" / "mine")
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "dtype": "bfloat16",
    }
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [1, 2]},
        "preprocessor_config.json": {},
        "tokenizer.json": {},
        "tokenizer_config.json": {"chat_template": "{{ messages }}"},
    }
    for name, content in files.items():
        (run.merged / name).write_text(json.dumps(content))
    write_weights(run.merged, *NAMES)
    return run


def test_a_complete_folder_is_said_to_load(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert samestep("export", "mine", "--format", "vllm") == 0
    said = capsys.readouterr().out
    assert f"vllm serve {run.merged}" in said
    assert "4 tensors with the hub's names" in said


def test_every_lack_is_named_at_once(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    write_weights(run.merged, *NAMES[:2], "model.layers.0.mlp.up_proj.lora_A.weight")
    (run.merged / "generation_config.json").write_text("{}")
    (run.merged / "preprocessor_config.json").unlink()
    (run.merged / "config.json").write_text('{"model_type": "qwen2_vl"}')
    assert samestep("export", "mine", "--format", "vllm") == 2
    said = capsys.readouterr().err
    for lack in ("architectures", "lora_A", "no image", "eos_token_id"):
        assert lack in said


@pytest.mark.parametrize(
    ("names", "lack"),
    [
        (NAMES[:3], "lm_head.weight is missing"),
        ((*NAMES, "language_model.x"), "not named as on the hub"),
        ((*NAMES, "base_model.model.x"), "as in training"),
    ],
)
def test_tensors_that_a_loader_would_not_take_are_refused(
    run: RunDirectory, names: tuple[str, ...], lack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_weights(run.merged, *names)
    assert samestep("export", "mine", "--format", "vllm") == 2
    assert lack in capsys.readouterr().err


def test_a_damaged_file_or_no_merge_is_a_line(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run.merged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (run.merged / "tokenizer_config.json").write_text("[]")
    assert samestep("export", "mine", "--format", "vllm") == 2
    said = capsys.readouterr().err
    assert "is damaged" in said
    assert "no mapping" in said
    (run.merged / "config.json").unlink()
    assert samestep("export", "mine", "--format", "vllm") == 2
    assert "no merged model yet" in capsys.readouterr().err
    assert samestep("export", "mine", "--format", "onnx") == 2


def test_gguf_is_written_by_llama_cpp_or_the_command_is_said(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert samestep("export", "mine", "--format", "gguf") == 2
    said = capsys.readouterr().err
    assert f"convert_hf_to_gguf.py {run.merged} --outfile {run.path / 'mine.gguf'}" in said
    assert "--mmproj" in said
    converter = tmp_path / "llama" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    monkeypatch.setenv("LLAMA_CPP", str(converter.parent))
    assert samestep("export", "mine", "--format", "gguf") == 2
    assert "has no convert_hf_to_gguf.py" in capsys.readouterr().err
    converter.write_text(
        "import sys; open(sys.argv[3], 'w').write('half'); sys.exit('mmproj' in str(sys.argv))"
    )
    converter.chmod(converter.stat().st_mode | stat.S_IXUSR)
    assert samestep("export", "mine", "--format", "gguf") == 1
    assert (run.path / "mine.gguf").is_file()
    assert [file.name for file in run.path.glob("*mmproj*")] == []
    converter.write_text("import sys; open(sys.argv[3], 'w').write('whole')")
    assert samestep("export", "mine", "--format", "gguf") == 0
    assert (run.path / "mine.gguf").read_text() == "half"  # was finished before
    assert (run.path / "mmproj-mine.gguf").read_text() == "whole"
