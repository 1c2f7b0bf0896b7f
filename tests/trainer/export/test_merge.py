"""Merging: equal to PEFT's own result, proven by reading back, and refused where it would ruin a model."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from launch.checkpoints.adapter_file import read_digest
from launch.checkpoints.publish import publish
from launch.errors import CheckpointError
from launch.run.directory import RunDirectory
from launch.run.merged_model import merges_behind
from tests.helpers.checkpoints import halve
from tests.helpers.merging import WEIGHTS, change_config, make_adapter, merge, merged_by_peft, rename_keys
from trainer.embedded.tiny_model import random_tiny
from trainer.export import merge as merging
from trainer.export.merge import main
from trainer.export.merge_plan import MergeRequest, plan_merge
from trainer.export.output_folder import atomic_output
from trainer.export.verify import verify_merged
from trainer.formats.key_names import canonical_name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    random_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture
def own_adapter(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "own_adapter"))


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "own_base"))


def test_a_run_directory_merges_to_what_peft_merges_and_every_other_tensor_keeps_its_bytes(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    output = run / "merged"
    assert main([str(run), "--output", str(output)]) == 0
    assert "4 for 4 lora pairs" in capsys.readouterr().out

    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qv"}

    loaded = Qwen2VLForConditionalGeneration.from_pretrained(output)
    AutoProcessor.from_pretrained(output)
    expected = merged_by_peft(base, adapter)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    names = {file.name for file in output.iterdir()}
    assert names == {file.name for file in base.iterdir()} | {"README.md", "merge.json"}
    assert not list(run.glob("*.partial"))

    record = json.loads((output / "merge.json").read_text())
    assert record["adapter_sha256"] == read_digest(run / "adapter")
    assert merges_behind(RunDirectory(run)) == []
    halved = {name: tensor / 2 for name, tensor in load_file(run / "adapter" / WEIGHTS).items()}
    save_file(halved, run / "adapter" / WEIGHTS, {"format": "pt"})  # the run went on
    assert len(merges_behind(RunDirectory(run))) == 1


def test_rank_and_alpha_patterns_and_rslora_over_all_linear_layers_merge_as_peft_does(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(
        base,
        tmp_path / "adapter",
        target_modules="all-linear",
        use_rslora=True,
        rank_pattern={"mlp.down_proj": 2, "visual.blocks.0.attn.qkv": 8},
        alpha_pattern={"layers.1.self_attn.q_proj": 3, "o_proj": 5},
    )
    report = merge(adapter, tmp_path / "merged")
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    expected = merged_by_peft(base, adapter)
    assert report.changed == report.pairs == len(load_file(adapter / WEIGHTS)) // 2 > 20
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)


def test_a_bf16_base_in_several_files_keeps_its_files_and_is_rounded_once_from_fp32(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    sharded, output = tmp_path / "sharded", tmp_path / "merged"
    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="300KB")
    for file in (
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        if (base / file).exists():
            shutil.copy(base / file, sharded)
    report = merge(adapter, output, base_model=str(sharded))
    index = "model.safetensors.index.json"
    assert report.files > 2
    assert (output / index).read_bytes() == (sharded / index).read_bytes()
    pairs = load_file(adapter / WEIGHTS)
    key = "base_model.model.model.language_model.layers.1.self_attn.v_proj.lora_{}.weight"
    weight = model.state_dict()["model.language_model.layers.1.self_attn.v_proj.weight"]
    expected = (weight.float() + pairs[key.format("B")] @ pairs[key.format("A")] * 4).bfloat16()
    written = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
    assert torch.equal(written["model.layers.1.self_attn.v_proj.weight"], expected)


def test_the_chosen_dtype_is_stored_in_weights_and_config(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(adapter, tmp_path / "merged", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "merged/model.safetensors").values()} == {torch.bfloat16}
    assert Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    assert (report.changed, report.converted, report.unchanged) == (4, report.tensors - 4, 0)
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert (record["converted"], record["converted_to"], record["byte_identical"]) == (
        report.converted,
        "bfloat16",
        0,
    )
    words = f"{report.converted} only converted to bfloat16, 0 are byte-identical to the base"
    assert words in (tmp_path / "merged/README.md").read_text()


def test_tensors_that_have_the_chosen_dtype_already_keep_their_bytes(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, dtype in enumerate(("float32", "bfloat16")):
        assert main([str(adapter), "--output", str(tmp_path / dtype), "--dtype", dtype]) == 0
        assert ("converted to bfloat16" in capsys.readouterr().out) == bool(number)
    record = json.loads((tmp_path / "float32/merge.json").read_text())
    assert (record["converted"], record["converted_to"]) == (0, None)
    assert record["byte_identical"] == record["tensors"] - 4


def test_names_of_other_transformers_versions_find_the_same_tensors(
    base: Path, own_base: Path, own_adapter: Path, adapter: Path, tmp_path: Path
) -> None:
    merge(adapter, tmp_path / "expected")
    expected = load_file(tmp_path / "expected/model.safetensors")

    rename_keys(own_adapter, lambda key: key.replace("model.model.language_model.", "model.model."))
    merge(own_adapter, tmp_path / "old_adapter")
    old = load_file(tmp_path / "old_adapter/model.safetensors")
    assert all(torch.equal(old[name], expected[name]) for name in expected)

    def in_memory(name: str) -> str:
        if name.startswith("visual."):
            return "model." + name
        return name.replace("model.", "model.language_model.", 1)

    rename_keys(own_base, in_memory, "model.safetensors")
    merge(adapter, tmp_path / "new_base", base_model=str(own_base))
    new = load_file(tmp_path / "new_base/model.safetensors")
    assert all(torch.equal(new[in_memory(name)], expected[name]) for name in expected)
    assert canonical_name("visual.blocks.0.attn.qkv") == canonical_name("model.visual.blocks.0.attn.qkv")


def test_a_checkpoint_merges_while_its_files_are_as_published(
    own_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "run/checkpoint-20"
    checkpoint.parent.mkdir()
    publish(own_adapter, checkpoint, {"step": 20})
    assert merge(checkpoint, tmp_path / "merged").changed == 4
    weights = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert WEIGHTS in refused(capsys, checkpoint, tmp_path / "again")


def refused(capsys: pytest.CaptureFixture[str], source: Path, output: Path, *more: str) -> str:
    """The message of a refused merge; nothing may be written beside or below `output`."""
    before = sorted(output.parent.rglob("*"))
    assert main([str(source), "--output", str(output), *more]) == 2
    assert sorted(output.parent.rglob("*")) == before
    return " ".join(capsys.readouterr().err.split())


def test_places_that_cannot_be_read_or_written_are_refused(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "there").mkdir()
    assert "exists already" in refused(capsys, adapter, tmp_path / "there")
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "no adapter, and no checkpoint of a known form" in refused(
        capsys, tmp_path / "there", tmp_path / "out"
    )
    assert "no such folder" in refused(
        capsys, adapter, tmp_path / "out", "--base-model", str(tmp_path / "gone")
    )
    assert "no config.json" in refused(
        capsys, adapter, tmp_path / "out", "--base-model", str(tmp_path / "there")
    )
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/something").touch()
    assert "not the rest of our own writing" in refused(capsys, adapter, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert "GB are needed" in refused(capsys, adapter, tmp_path / "out2")


def test_a_hub_base_without_network_is_refused_with_what_to_do(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(capsys, adapter, tmp_path / "out", "--base-model", "nobody/no-such-model")
    assert "not in the cache" in message
    assert "samestep prepare" in message


def test_a_base_that_does_not_fit_is_refused(
    base: Path, own_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    random_tiny(tmp_path / "wide", hidden=128)
    message = refused(capsys, adapter, output, "--base-model", str(tmp_path / "wide"))
    assert "4 of 4 lora pairs do not fit" in message
    assert "[64, 64]" in message
    assert "[128, 128]" in message

    random_tiny(tmp_path / "short", layers=1)
    message = refused(capsys, adapter, output, "--base-model", str(tmp_path / "short"))
    assert "2 of 4" in message
    assert "layers.1.self_attn.q_proj matches no tensor" in message

    change_config(own_base, "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantized (bitsandbytes)" in refused(capsys, adapter, output, "--base-model", str(own_base))
    change_config(own_base, "config.json", quantization_config=None)

    weights = own_base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "where its header says" in refused(capsys, adapter, output, "--base-model", str(own_base))
    weights.unlink()
    assert "no model.safetensors" in refused(capsys, adapter, output, "--base-model", str(own_base))
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (own_base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 1 weight files are missing" in refused(
        capsys, adapter, output, "--base-model", str(own_base)
    )


def with_header(file: Path, header: object) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


INDEX = "model.safetensors.index.json"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("name", "damage", "word"),
    [
        ("config.json", halve, "cannot be read"),
        ("config.json", lambda file: file.write_text("[]"), "cannot be read (is no mapping"),
        ("config.json", lambda file: file.write_text('{"text_config": [1]}'), "text_config is wrong"),
        (INDEX, lambda file: file.write_text('{"weight_map": {'), "cannot be read"),
        (INDEX, lambda file: file.write_text("{}"), "weight_map is wrong (field required)"),
        (INDEX, lambda file: file.write_text('{"weight_map": ["a"]}'), "weight_map is wrong"),
        (INDEX, lambda file: file.write_text('{"weight_map": {"a": 5}}'), "weight_map names what is no file"),
        ("model.safetensors", lambda file: with_header(file, [ENTRY]), "the whole is wrong"),
        ("model.safetensors", lambda file: with_header(file, {"a": [1]}), "a is wrong"),
        ("model.safetensors", lambda file: with_header(file, {"a": {"dtype": "F32"}}), "a.shape is wrong"),
        (
            "model.safetensors",
            lambda file: with_header(file, {"a": {**ENTRY, "shape": [3]}}),
            "a has 8 bytes for F32 [3]",
        ),
    ],
)
def test_a_damaged_file_of_the_base_is_refused_by_its_name(
    own_base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], object],
    word: str,
) -> None:
    damage(own_base / name)
    said = refused(capsys, adapter, tmp_path / "out", "--base-model", str(own_base))
    assert f"error: {own_base / name}: {word}" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_of_the_base_that_may_not_be_read_is_refused_by_its_name(
    own_base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    opening = os.open

    def as_another_user(path: Any, *rest: Any, **more: Any) -> int:
        if path == str(own_base / name):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opening(path, *rest, **more)

    monkeypatch.setattr(os, "open", as_another_user)
    said = refused(capsys, adapter, tmp_path / "out", "--base-model", str(own_base))
    assert f"error: {own_base / name}: cannot be read (" in said
    assert "Permission denied" in said


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"use_dora": True}, "lora_magnitude_vector are needed"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, of which no tensor"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "LOHA"}, "peft_type: LOHA"),
        ({"a_method_of_tomorrow": 3}, "a_method_of_tomorrow"),
        ({"r": 8}, "rank 8"),
        ({"base_model_name_or_path": None}, "--base-model"),
        (
            {"rank_pattern": [4]},
            "adapter_config.json: rank_pattern is wrong (input should be a valid dictionary",
        ),
        ({"rank_pattern": {"q_proj": "4"}}, "adapter_config.json: rank_pattern.q_proj is wrong"),
        ({"alpha_pattern": {"q_(proj": 3}}, "'q_(proj' is no regular expression: missing )"),
        (
            {"lora_alpha": "16"},
            "adapter_config.json: lora_alpha is wrong (input should be a valid number, not '16')",
        ),
        ({"lora_alpha": float("nan")}, "adapter_config.json: lora_alpha is wrong"),
        ({"r": None}, "adapter_config.json: r is wrong"),
        ({"modules_to_save": 5}, "adapter_config.json: modules_to_save is wrong"),
        ({"target_modules": 5}, "neither a pattern nor a list of names: 5"),
        ({"use_dora": "yes"}, "adapter_config.json: use_dora is wrong"),
    ],
)
def test_what_would_not_be_merged_exactly_is_refused_by_name(
    own_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], word: str
) -> None:
    change_config(own_adapter, **values)
    assert word in refused(capsys, own_adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda t: {k.replace("self_attn", "attention"): v for k, v in t.items()}, "matches no tensor"),
        (
            lambda t: {k: v * 0 if "layers.0.self_attn.q_proj.lora_B" in k else v for k, v in t.items()},
            "1 of 4",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "layers.0.self_attn.q_proj.lora_B" not in k},
            "has lora_A only",
        ),
        (lambda t: {}, "holds no tensors of an adapter"),
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(2)}, "lm_head.weight is neither"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "undefined"),
        (
            lambda t: {**t, **{k.replace("language_model.", ""): v for k, v in t.items()}},
            "is there twice, under two names",
        ),
    ],
)
def test_damaged_adapter_weights_are_refused(
    own_adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    word: str,
) -> None:
    tensors = damage(load_file(own_adapter / WEIGHTS))
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, own_adapter / WEIGHTS)
    assert word in refused(capsys, own_adapter, tmp_path / "out")


def test_one_flipped_byte_in_the_result_is_found_and_named(adapter: Path, tmp_path: Path) -> None:
    plan = plan_merge(MergeRequest(adapter, tmp_path / "merged"))
    merge(adapter, tmp_path / "merged")
    file = tmp_path / "merged/model.safetensors"
    for name in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        good = file.read_bytes()
        position = next(s.entries[name].begin for s in plan.shards) + 403  # the high byte of element 100
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match=name):
            verify_merged(plan, tmp_path / "merged")
        file.write_bytes(good)
    assert verify_merged(plan, tmp_path / "merged").changed == 4


def test_a_change_that_rounding_swallows_is_not_called_a_merge(own_adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(own_adapter / WEIGHTS)
    save_file(
        {k: v * 1e-5 if "layers.0.self_attn.q" in k else v for k, v in tensors.items()}, own_adapter / WEIGHTS
    )
    with pytest.raises(
        CheckpointError, match=r"1 of 4 merged tensors equal the base .*layers\.0\.self_attn\.q_proj"
    ):
        merge(own_adapter, tmp_path / "merged", dtype="bfloat16")
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "merged.partial").exists()


def test_the_rest_of_a_killed_merge_is_replaced(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "write_shard", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill cleans nothing up
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "merged")
    assert (tmp_path / "merged.partial").is_dir()
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()
    assert merge(adapter, tmp_path / "merged").changed == 4
    assert not (tmp_path / "merged.partial").exists()


def test_the_folder_that_another_process_writes_is_left_alone(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.run.lock._LOCK_PATIENCE_S", 0.0)
    output, theirs = tmp_path / "merged", tmp_path / "merged.partial/model.safetensors"
    with atomic_output(output):
        theirs.write_text("half")
        assert "writes there now; wait" in refused(capsys, adapter, output)
        with pytest.raises(CheckpointError, match="writes there now; wait"), atomic_output(output):
            pass  # asked before the other began
        assert theirs.read_text() == "half"
    assert (output / "model.safetensors").read_text() == "half"
    with pytest.raises(CheckpointError, match="exists already"), atomic_output(output):
        pass  # asked while the other wrote
