"""What merging does beyond plain LoRA: DoRA, saved modules, the rounded base, its base's identity, kills, the card."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from launch.checkpoints.publish import publish
from launch.errors import CheckpointError
from launch.inputs.caches import embedded_folder
from launch.inputs.identity import model_identity
from launch.inputs.model_files import old_base_identity
from launch.recipe.loading import dump_recipe, recipe_from_dict
from launch.recipe.schema import Recipe
from tests.conftest import recipe_values
from tests.helpers.adapters import write_run
from tests.helpers.merging import WEIGHTS, change_config, make_adapter, merge, merged_by_peft
from trainer.embedded.tiny_model import random_tiny
from trainer.export import merge as merging
from trainer.export.adapter import read_adapter
from trainer.export.base_model import check_base
from trainer.export.merge import main
from trainer.export.merge_plan import MergePlan, MergeRequest, plan_merge
from trainer.export.model_card import adapter_card, refresh_figures
from trainer.export.verify import MergeReport, verify_merged
from trainer.formats.key_names import memory_name
from trainer.model.base import load_base
from trainer.pretrained import load_processor


@pytest.fixture(scope="module")
def base(world: Path) -> Path:
    return world / "base"


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "target_modules": "all-linear", "rank_pattern": {"mlp.up_proj": 2}},
        {"use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "merger", "norm"]},
    ],
)
def test_dora_and_saved_modules_merge_as_peft_does(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    report = merge(adapter, tmp_path / "merged")
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    expected, before = merged_by_peft(base, adapter), load_file(base / "model.safetensors")
    assert report.changed == report.pairs + report.saved >= 4
    for name, tensor in loaded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)
    changed = sum(not torch.equal(tensor, loaded[memory_name(name)]) for name, tensor in before.items())
    assert changed == report.changed
    assert report.unchanged == len(before) - changed


def test_a_dora_length_that_is_wrong_on_disk_is_found(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", use_dora=True)
    plan = plan_merge(MergeRequest(adapter, tmp_path / "merged"))
    merge(adapter, tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    file, entry = tmp_path / "merged/model.safetensors", plan.shards[0].entries[name]
    content = bytearray(file.read_bytes())
    row = torch.frombuffer(content, dtype=torch.float32, count=64, offset=entry.begin)
    row *= 1 + 1e-4  # one row too long by a ten-thousandth
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj"):
        verify_merged(plan, tmp_path / "merged")


@pytest.mark.parametrize(
    "lora", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_a_tied_embedding_is_not_changed_on_one_side_only(
    base: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    tied = Path(shutil.copytree(base, tmp_path / "tied"))
    change_config(tied, "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="lm_head is tied"):
        merge(adapter, tmp_path / "merged", base_model=str(tied))


# The rounded base ------------------------------------------------------------------------


def quantized_recipe(world: Path, dtype: str, double: bool) -> Recipe:
    values = recipe_values(world)
    values["model"]["dtype"] = dtype
    values["quantization"] |= {"load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    return recipe_from_dict(values)


@pytest.mark.parametrize(("dtype", "double"), [("bfloat16", True), ("float32", False), ("float32", True)])
def test_the_dequantized_base_is_the_one_that_a_4_bit_model_computes_with(
    world: Path, tmp_path: Path, dtype: str, double: bool
) -> None:
    recipe = quantized_recipe(world, dtype, double)
    run = write_run(recipe, tmp_path / "run")
    report = merge(run.path, tmp_path / "merged", base="dequantized")
    written = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged").state_dict()
    layers = {
        n: m for n, m in load_base(recipe, torch.device("cpu")).named_modules() if isinstance(m, Linear4bit)
    }
    pairs = {pair.module: pair for pair in read_adapter(run.adapter).pairs}
    assert len(layers) == report.rounded + report.pairs > 12
    for name, layer in layers.items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert weight.dtype == getattr(torch, dtype)
        if name not in pairs:
            assert torch.equal(written[f"{name}.weight"], weight.float()), name
        else:
            expected = weight.double() + pairs[name].b.double() @ pairs[name].a.double() * pairs[name].scaling
            torch.testing.assert_close(written[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert (record["base"], record["rounded"], record["byte_identical"]) == (
        "dequantized",
        report.rounded,
        report.tensors - report.rounded - report.changed,
    )


def test_a_flipped_bit_in_a_rounded_tensor_is_found(world: Path, tmp_path: Path) -> None:
    run = write_run(quantized_recipe(world, "float32", True), tmp_path / "run")
    plan = plan_merge(MergeRequest(run.path, tmp_path / "merged", base="dequantized"))
    merge(run.path, tmp_path / "merged", base="dequantized")
    file, name = tmp_path / "merged/model.safetensors", "model.layers.0.mlp.up_proj.weight"
    content = bytearray(file.read_bytes())
    content[plan.shards[0].entries[name].begin + 400] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj"):
        verify_merged(plan, tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "byte"),
    [
        ("lm_head.weight", 403),  # the high byte of a number
        ("model.layers.0.mlp.up_proj.weight", 403),
        ("model.layers.1.self_attn.q_proj.weight", 403),
        ("model.layers.1.self_attn.q_proj.weight", 400),  # the low one: what rounding could explain
    ],
)
def test_what_the_disk_makes_of_a_tensor_is_found_before_it_is_published(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, byte: int
) -> None:
    run = write_run(quantized_recipe(world, "float32", True), tmp_path / "run")

    def damage_then_verify(plan: MergePlan, folder: Path, *rest: Any) -> MergeReport:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[plan.shards[0].entries[name].begin + byte] ^= 1
        file.write_bytes(content)
        return verify_merged(plan, folder, *rest)

    monkeypatch.setattr(merging, "verify_merged", damage_then_verify)
    with pytest.raises(CheckpointError, match=name):
        merge(run.path, tmp_path / "merged", base="dequantized")
    assert not list(tmp_path.glob("merged*"))


def test_the_rounded_base_needs_to_know_how_it_was_rounded(
    world: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    asked = [str(adapter), "--output", str(tmp_path / "out"), "--base", "dequantized"]
    assert main(asked) == 2
    assert "--recipe" in capsys.readouterr().err
    plain = tmp_path / "plain.yaml"
    plain.write_text(dump_recipe(recipe_from_dict(recipe_values(world))))
    assert main([*asked, "--recipe", str(plain)]) == 2
    assert "not quantized" in capsys.readouterr().err
    plain.write_text(dump_recipe(quantized_recipe(world, "float32", True)))
    assert main([*asked, "--recipe", str(plain)]) == 0
    assert "rounded to 4 bits" in capsys.readouterr().out


# The base of the training ----------------------------------------------------------------


def _of_now(base: Path) -> dict[str, Any]:
    return {"identity": dict(model_identity(base).parts)}


def _of_an_older_version(base: Path) -> dict[str, Any]:
    return {"base_identity": old_base_identity(base)}


@pytest.mark.parametrize(
    ("facts", "words"),
    [(_of_now, r"the same content \(weights "), (_of_an_older_version, r"the same sampled content \(")],
)
def test_a_base_of_another_revision_is_refused_where_the_run_says_its_own(
    world: Path, tmp_path: Path, facts: Callable[[Path], dict[str, Any]], words: str
) -> None:
    run = write_run(recipe_from_dict(recipe_values(world)), tmp_path / "run")
    aside = tmp_path / "aside"
    shutil.copytree(run.adapter, aside)
    publish(aside, run.checkpoint(3), {"step": 3, **facts(world / "base")})
    random_tiny(tmp_path / "other", seed=1)
    for source in (run.path, run.adapter, run.checkpoint(3)):
        with pytest.raises(CheckpointError, match="is not the base that the run was trained on"):
            merge(source, tmp_path / "merged", base_model=str(tmp_path / "other"))
    shutil.copytree(world / "base", tmp_path / "same")
    check = check_base(read_adapter(run.path), tmp_path / "same")
    assert check.compared
    assert re.match(f"base compared with the training's: {words}", str(check))


def test_each_part_of_a_base_that_differs_is_named_with_both_digests_and_may_be_allowed(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(recipe_from_dict(recipe_values(world)), tmp_path / "run")
    shutil.copytree(run.adapter, tmp_path / "aside")
    publish(tmp_path / "aside", run.checkpoint(3), {"step": 3, **_of_now(world / "base")})
    other = Path(shutil.copytree(world / "base", tmp_path / "v1" / "snapshots" / "v1"))
    for name in ("processor_config.json", "chat_template.jinja"):
        (other / name).write_text((other / name).read_text() + "\n")
    asked = [str(run.path), "--output", str(tmp_path / "merged"), "--base-model", str(other)]
    assert main(asked) == 2
    said = capsys.readouterr().err
    here, there = model_identity(other).parts, model_identity(world / "base").parts
    for part in ("model.processor", "model.chat_template"):
        assert (
            f"{part}: checkpoint-3/manifest.json has '{there[part][:12]}', here it is '{here[part][:12]}'"
            in said
        )
    assert "model.weights" not in said
    assert main([*asked, "--allow", "model.processor"]) == 2
    assert "(parts that differ: 1)" in capsys.readouterr().err
    assert main([*asked, "--allow", "model.procesor"]) == 2
    assert "did you mean model.processor?" in capsys.readouterr().err
    assert main([*asked, "--allow", "model.processor", "--allow", "model.chat_template"]) == 0
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert "it differs as allowed; model.processor: checkpoint-3" in record["base_comparison"]
    assert record["base_comparison"] in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (None, "no checkpoint of the run is left"),
        ({"base_identity": "v1"}, "checkpoint-3/manifest.json does not say what its base was"),
        ({}, "checkpoint-3/manifest.json does not say what its base was"),
        ({"base_identity": None}, "checkpoint-3/manifest.json does not say what its base was"),
        ({"base_identity": "a" * 40}, "checkpoint-3/manifest.json knows its base by its commit"),
    ],
)
def test_a_base_that_cannot_be_compared_with_the_trainings_is_said_to_be_so(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    facts: dict[str, Any] | None,
    reason: str,
) -> None:
    run = write_run(recipe_from_dict(recipe_values(world)), tmp_path / "run")
    if facts is not None:
        shutil.copytree(run.adapter, tmp_path / "aside")
        publish(tmp_path / "aside", run.checkpoint(3), {"step": 3, **facts})
    random_tiny(tmp_path / "other", seed=1)
    sources = [run.adapter] if facts is None else [run.path, run.checkpoint(3)]
    for number, source in enumerate(sources):
        output = tmp_path / f"merged-{number}"
        assert main([str(source), "--output", str(output), "--base-model", str(tmp_path / "other")]) == 0
        line = f"base not compared with the training's: {reason}"
        assert line in capsys.readouterr().out
        record = json.loads((output / "merge.json").read_text())
        assert record["base_compared"] is False
        assert record["base_comparison"].startswith(line)
        assert f"The {line}" in (output / "README.md").read_text()


def test_where_the_base_was_compared_that_is_said_and_of_a_bare_adapter_that_it_was_not(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(recipe_from_dict(recipe_values(world)), tmp_path / "run")
    bare = Path(shutil.copytree(run.adapter, tmp_path / "bare"))
    shutil.copytree(run.adapter, tmp_path / "aside")
    publish(tmp_path / "aside", run.checkpoint(3), {"step": 3, **_of_now(world / "base")})
    weights = model_identity(world / "base").parts["model.weights"]
    for source, words, compared in (
        (
            run.path,
            f"base compared with the training's: the same content (weights {weights[:12]}, 6 parts)",
            True,
        ),
        (bare, "base not compared with the training's: bare is no checkpoint of samestep", False),
    ):
        output = tmp_path / f"merged-{source.name}"
        assert main([str(source), "--output", str(output)]) == 0
        assert words in capsys.readouterr().out
        assert json.loads((output / "merge.json").read_text())["base_compared"] is compared
        assert f"The {words}" in (output / "README.md").read_text()


# Kills -----------------------------------------------------------------------------------


def test_a_merge_that_is_killed_leaves_no_half_model_and_the_next_one_completes(tmp_path: Path) -> None:
    random_tiny(tmp_path / "base", hidden=512, layers=6)
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    output, aside = tmp_path / "merged", tmp_path / "merged.partial"
    size = (tmp_path / "base/model.safetensors").stat().st_size
    weights = aside / "model.safetensors"

    def has(count: int) -> bool:
        return weights.is_file() and weights.stat().st_size >= count

    forks = multiprocessing.get_context("fork")
    for moment in (
        lambda: aside.is_dir(),
        lambda: has(size // 2),
        lambda: has(size),
    ):  # the last: while it verifies
        child = forks.Process(target=merge, args=(adapter, output))
        child.start()
        deadline = time.monotonic() + 60
        while not moment() and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not output.exists()
        assert aside.is_dir()
    (aside / "of_another_attempt.json").touch()
    assert merge(adapter, output).changed == 12
    assert not (output / "of_another_attempt.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "merged", ".merged.partial.lock"}
    assert ".samestep-writes" not in {path.name for path in output.iterdir()}


# The card --------------------------------------------------------------------------------


def test_the_card_says_base_data_recipe_figures_and_how_to_load(world: Path, tmp_path: Path) -> None:
    values = recipe_values(world)
    run = write_run(recipe_from_dict(values), tmp_path / "run")
    run.metrics_file.write_text('{"step": 1, "loss": 2.5}\n{"step": 6, "loss": 1.25}\n')
    accuracy = {"overall": {"percent": 40.0, "standard_error": 1.0, "correct": 4, "count": 10}}
    result = {"questions": 10, "split": "test", "accuracy": {"adapter": accuracy}}
    run.eval_file().write_text(json.dumps(result))
    merge(run.path, run.merged)
    card = (run.merged / "README.md").read_text()
    for words in (
        "library_name: transformers",
        str(world / "base"),
        str(world / "charts"),
        "6 steps of 8 samples",
        "Training loss 2.500 at step 1, 1.250 at step 6",
        "| adapter | 40.0 % | 4 of 10 |",
        "AutoModelForImageTextToText.from_pretrained",
        "vllm serve .",
        'PeftModel.from_pretrained(base, "../adapter")',
    ):
        assert words in card
    accuracy["overall"]["percent"] = 50.0
    run.eval_file().write_text(json.dumps(result))
    refresh_figures(run)
    refreshed = (run.merged / "README.md").read_text()
    assert refreshed == card.replace("40.0 %", "50.0 %")
    run.eval_file().write_text(json.dumps(result | {"weights": {"adapter": "of an older one"}}))
    refresh_figures(run)
    assert "50.0 %" not in (run.merged / "README.md").read_text()
    run.metrics_file.write_text('{"step": 1, "loss": null}\n')  # no figure, and no reason to fail
    (run.path / "eval.json").write_text("half")
    shutil.rmtree(run.merged)
    merge(run.path, run.merged)
    assert "40.0" not in (run.merged / "README.md").read_text()


@pytest.mark.parametrize("embedded", [False, True])
def test_the_code_of_the_cards_runs_as_it_stands(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    values = recipe_values(world)
    if embedded:  # its base lies in the cache of whoever loads it
        monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
        shutil.copytree(world / "base", embedded_folder() / "model")
        values["model"]["name_or_path"] = "embedded"
    recipe = recipe_from_dict(values)
    run = write_run(recipe, tmp_path / "run")
    named = json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == ("embedded" if embedded else str(world / "base"))
    (run.adapter / "README.md").write_text(adapter_card(run, recipe, named, run.adapter))
    load_processor(recipe).save_pretrained(str(run.adapter))
    merge(run.path, run.merged)
    for folder, pieces in ((run.merged, 2), (run.adapter, 1)):
        code = re.findall(
            r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE
        )
        assert len(code) == pieces
        monkeypatch.chdir(folder)
        made: dict[str, Any] = {}
        for piece in code:
            exec(piece, made)
        assert isinstance(made["model"], PeftModel)
        assert any(weight.any() for name, weight in made["model"].named_parameters() if ".lora_B." in name)
        assert made["processor"].tokenizer("bar").input_ids


def test_the_config_stays_the_bases_and_the_source_stays(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged")
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert (adapter / WEIGHTS).is_file()
