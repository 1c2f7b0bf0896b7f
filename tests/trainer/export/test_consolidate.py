"""Consolidating: what other libraries wrote, on several processes, becomes one adapter, tensor by tensor the same."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from launch.checkpoints.publish import publish
from launch.errors import CheckpointError
from tests.helpers.merging import make_adapter
from trainer.export.adapter import AdapterOverrides, read_adapter
from trainer.export.consolidate import consolidate, main, print_consolidated
from trainer.export.merge import merge
from trainer.export.merge_plan import MergeRequest
from trainer.formats.detect import import_checkpoint
from trainer.formats.key_names import adapter_key, adapter_keys, parameter_name
from trainer.formats.optimizer_state import parameter_order

STEP = "checkpoint-3"
UNIVERSAL = f"{STEP}/global_step3_universal"


FORMS = {
    "ddp": (STEP, "transformers Trainer"),
    "fsdp_sharded": (STEP, "FSDP, sharded (2 files)"),
    "fsdp_full": (STEP, "FSDP, in one file"),
    "zero2": (STEP, "ZeRO-2 of 3 ranks"),
    "zero3": (STEP, "ZeRO-3 of 3 ranks"),
}


def truth(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and moments by parameter name, as the training's own process gathered them."""
    tensors = load_file(folder / "truth.safetensors")
    weights = {
        name: tensor for name, tensor in tensors.items() if not name.endswith((".exp_avg", ".exp_avg_sq"))
    }
    return weights, {name: tensor for name, tensor in tensors.items() if name not in weights}


def loaded_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(Qwen2VLForConditionalGeneration.from_pretrained(base), str(adapter))
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("engine", FORMS)
def test_a_checkpoint_of_every_engine_becomes_the_adapter_that_its_processes_held(
    foreign: Path, world: Path, tmp_path: Path, engine: str
) -> None:
    place, form = FORMS[engine]
    alpha = (
        AdapterOverrides(lora_alpha=12, base_model=str(world / "base")) if engine == "fsdp_sharded" else None
    )
    done = consolidate(foreign / engine / place, tmp_path / "adapter", alpha)
    assert form in done.imported.form
    weights, optimizer_state = truth(foreign / engine)
    loaded = loaded_by_peft(world / "base", tmp_path / "adapter")
    assert_same({parameter_name(key): tensor for key, tensor in loaded.items()}, weights)
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 12, str(world / "base"))

    steps = {name for name in done.imported.optimizer_state if name.endswith(".step")}
    assert {float(done.imported.optimizer_state[name]) for name in steps} == {3.0}
    assert_same({n: t for n, t in done.imported.optimizer_state.items() if n not in steps}, optimizer_state)
    assert (done.imported.step, done.imported.lost) == (3, ())


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_universal_checkpoint_holds_the_same_adapter_and_moments(foreign: Path, engine: str) -> None:
    shards, universal = (
        import_checkpoint(foreign / engine / STEP),
        import_checkpoint(foreign / engine / UNIVERSAL),
    )
    assert "universal" in universal.form
    assert_same(universal.tensors, shards.tensors)
    assert_same(universal.optimizer_state, shards.optimizer_state)
    assert (universal.step, universal.config) == (3, shards.config)


def test_weights_that_a_library_put_together_are_an_adapter_without_moments(foreign: Path) -> None:
    for found, engine in (
        (import_checkpoint(foreign / "merge_weights"), "fsdp_sharded"),
        (import_checkpoint(foreign / "merge_weights/model.safetensors"), "fsdp_sharded"),
        (import_checkpoint(foreign / "zero3/zero_to_fp32"), "zero3"),
    ):
        assert "weights alone" in found.form
        assert found.lost == ("the optimizer's moments", "the number of steps")
        weights = truth(foreign / engine)[0]
        assert_same({parameter_name(key): tensor for key, tensor in found.tensors.items()}, weights)


def test_a_part_of_a_checkpoint_is_read_like_the_whole(foreign: Path) -> None:
    for part, whole in (
        ("fsdp_sharded/checkpoint-3/pytorch_model_fsdp_0", "fsdp_sharded/checkpoint-3"),
        ("zero3/checkpoint-3/global_step3", "zero3/checkpoint-3"),
    ):
        found = import_checkpoint(foreign / part)
        assert_same(found.tensors, import_checkpoint(foreign / whole).tensors)
        assert found.step == 3


def test_a_foreign_checkpoint_merges_at_once(foreign: Path, world: Path, tmp_path: Path) -> None:
    missing = AdapterOverrides(lora_alpha=12, base_model=str(world / "base"))
    consolidate(foreign / "fsdp_sharded" / STEP, tmp_path / "adapter", missing)
    expected = PeftModel.from_pretrained(
        Qwen2VLForConditionalGeneration.from_pretrained(world / "base"), str(tmp_path / "adapter")
    ).merge_and_unload()
    for engine, said in (("fsdp_sharded", missing), ("zero3", AdapterOverrides())):
        report = merge(MergeRequest(foreign / engine / STEP, tmp_path / engine, missing=said))
        assert (report.pairs, report.changed) == (6, 6)
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "fsdp_sharded").state_dict()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=1e-6)


# What is incomplete ----------------------------------------------------------------------


def refused(source: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_adapter(source, AdapterOverrides(lora_alpha=12))
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("engine", "file"),
    [
        ("fsdp_sharded", "pytorch_model_fsdp_0/__1_0.distcp"),
        ("fsdp_sharded", "pytorch_model_fsdp_0/.metadata"),
        ("zero2", "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero3", "global_step3/zero_pp_rank_2_mp_rank_00_optim_states.pt"),
        ("zero2", "global_step3/mp_rank_00_model_states.pt"),
        ("ddp", "adapter_model.safetensors"),
        ("ddp", "trainer_state.json"),
    ],
)
def test_a_missing_or_cut_file_is_refused_by_its_name(
    foreign: Path, tmp_path: Path, engine: str, file: str
) -> None:
    own = Path(shutil.copytree(foreign / engine / STEP, tmp_path / "own"))
    if engine != "ddp":  # the shards alone
        (own / "adapter_model.safetensors").unlink(missing_ok=True)
        for universal in own.glob("*universal"):
            shutil.rmtree(universal) if universal.is_dir() else universal.unlink()
    content = (own / file).read_bytes()
    (own / file).write_bytes(content[: len(content) // 2])
    refused(own, Path(file).name if "model_states" not in file else "states.pt")
    (own / file).unlink()
    if file == "trainer_state.json":
        assert import_checkpoint(own).lost == ("the number of steps",)
        return
    refused(own, Path(file).name if "model_states" not in file else "model_states.pt")


def test_a_universal_checkpoint_without_a_state_names_it(foreign: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(foreign / "zero2" / UNIVERSAL, tmp_path / "own_universal"))
    gone = next(own.glob("zero/*/exp_avg.pt"))
    gone.unlink()
    refused(own, "1 of 36 files are missing", gone.parent.name)


def test_fsdp_version_1_with_lora_which_saves_nothing_is_refused_by_name(foreign: Path) -> None:
    refused(foreign / "fsdp1_sharded" / STEP, "no tensors", "FSDP version 1")


def test_slices_of_one_rank_are_not_taken_for_an_adapter(foreign: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(foreign / "ddp" / STEP, tmp_path / "own"))
    tensors = load_file(own / "adapter_model.safetensors")
    save_file({k: t[: len(t) // 2].clone() for k, t in tensors.items()}, own / "adapter_model.safetensors")
    refused(own, "only one rank's slice")
    save_file({k: t[:0].clone() for k, t in tensors.items()}, own / "adapter_model.safetensors")
    refused(own, "12 of 12 tensors are empty")
    (tmp_path / "local").mkdir()
    (tmp_path / "local/pytorch_model_fsdp_rank0.bin").touch()
    refused(tmp_path / "local", "LOCAL_STATE_DICT")


def test_alpha_is_asked_for_where_no_file_tells_it(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(foreign / "fsdp_sharded" / STEP)
    assert main([source, "--output", str(tmp_path / "out")]) == 2
    assert "--lora-alpha" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    config = str(foreign / "fsdp_full" / STEP)
    assert main([source, "--output", str(tmp_path / "out"), "--adapter-config", config]) == 0
    assert "4, 12" in capsys.readouterr().out
    assert main([source, "--output", str(tmp_path / "out"), "--lora-alpha", "12"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_folders_without_a_lora_are_refused_with_what_is_known(world: Path, tmp_path: Path) -> None:
    refused(world / "base", "a model without a LoRA")
    refused(tmp_path, "no checkpoint of a known form")
    refused(tmp_path / "nowhere", "no such folder")


# What is of another kind -----------------------------------------------------------------


def write_zero(folder: Path, state: object, named: object = None) -> None:
    """Files of ZeRO-2 on one rank."""
    folder.mkdir()
    torch.save(state, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(named or {"param_shapes": [{}]}, folder / "mp_rank_00_model_states.pt")


ZERO = {"zero_stage": 2, "partition_count": 1}


@pytest.mark.parametrize(
    ("state", "named", "words"),
    [
        ({}, None, "zero_pp_rank_0_mp_rank_00_optim_states.pt: optimizer_state_dict is missing"),
        ([1], None, "zero_pp_rank_0_mp_rank_00_optim_states.pt: the whole is a list"),
        ({"optimizer_state_dict": [1]}, None, "optim_states.pt: optimizer_state_dict is a list"),
        ({"optimizer_state_dict": {**ZERO, "partition_count": "2"}}, None, "is of no ZeRO stage"),
        ({"optimizer_state_dict": ZERO}, None, "single_partition_of_fp32_groups is no list of tensors"),
        (
            {"optimizer_state_dict": {**ZERO, "single_partition_of_fp32_groups": []}},
            None,
            "holds 0 groups of weights where 1 are named",
        ),
        ({"optimizer_state_dict": ZERO}, [1], "mp_rank_00_model_states.pt: the whole is a list"),
        ({"optimizer_state_dict": ZERO}, {"param_shapes": [[1]]}, "model_states.pt: param_shapes is a list"),
        ({"optimizer_state_dict": ZERO}, {"param_shapes": [{"a": 5}]}, "param_shapes holds no shapes"),
        (
            {"optimizer_state_dict": ZERO},
            {"param_shapes": [{}], "global_steps": "abc"},
            "model_states.pt: global_steps is no whole number from 0 on ('abc')",
        ),
    ],
)
def test_deepspeeds_files_of_another_kind_are_refused_by_name(
    tmp_path: Path, state: object, named: object, words: str
) -> None:
    write_zero(tmp_path / "global_step3", state, named)
    refused(tmp_path, words)


def test_an_empty_latest_is_refused_by_name_beside_a_good_adapter_too(world: Path, tmp_path: Path) -> None:
    own = make_adapter(world / "base", tmp_path / "own")
    assert read_adapter(own).pairs
    for content, words in (
        ("", "is empty and names no folder"),
        ("global_step9", "global_step9, which is missing"),
        (".", "holds no *_optim_states.pt"),
    ):
        (own / "latest").write_text(content)
        refused(own, words)


@pytest.mark.parametrize(
    "name", ["pytorch_model_fsdp.bin", "optimizer.bin", "optimizer.pt", "adapter_model.bin"]
)
def test_a_list_in_the_place_of_a_mapping_is_refused_by_name(world: Path, tmp_path: Path, name: str) -> None:
    own = make_adapter(world / "base", tmp_path / "own")
    if name == "optimizer.bin":
        torch.save(load_file(own / "adapter_model.safetensors"), own / "pytorch_model_fsdp.bin")
    if name == "adapter_model.bin":
        (own / "adapter_model.safetensors").unlink()
    torch.save([1], own / name)
    refused(own, f"{name}: the whole is a list where a mapping is needed")


@pytest.mark.parametrize(
    "state",
    [
        {"state": {0: [1]}, "param_groups": [{"params": [*range(8)]}]},
        {"state": [1], "param_groups": [{"params": [*range(8)]}]},
        {"state": {}, "param_groups": [[1]]},
        {"state": {}, "param_groups": {"params": [1]}},
    ],
)
def test_a_state_that_is_no_adamws_is_lost_and_the_adapter_is_not(
    world: Path, tmp_path: Path, state: object
) -> None:
    own = make_adapter(world / "base", tmp_path / "own")
    torch.save(state, own / "optimizer.pt")
    assert "the optimizer's moments" in import_checkpoint(own).lost


@pytest.mark.parametrize("index", [[1], {"a": 5}, None])
def test_an_index_of_another_kind_is_refused_by_name(tmp_path: Path, index: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(tmp_path, "model.safetensors.index.json: weight_map")


@pytest.mark.parametrize("step", ["abc", "3", -1, 2.5, True, [3]])
def test_a_step_is_a_whole_number_or_refused(world: Path, tmp_path: Path, step: object) -> None:
    own = make_adapter(world / "base", tmp_path / "own")
    (own / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    assert import_checkpoint(own).step == 3
    (own / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    refused(own, "trainer_state.json: global_step is no whole number from 0 on")


# What must not run -----------------------------------------------------------------------


class Touch:
    """A pickle of this makes a file where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_code_in_a_checkpoint_does_not_run(foreign: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    own = Path(shutil.copytree(foreign / "fsdp_sharded" / STEP, tmp_path / "own"))
    (own / "pytorch_model_fsdp_0/.metadata").write_bytes(pickle.dumps(Touch(trap)))
    refused(own, ".metadata", "posix.mkdir")
    full = Path(shutil.copytree(foreign / "fsdp_full" / STEP, tmp_path / "full"))
    torch.save({"x": Touch(trap)}, full / "pytorch_model_fsdp.bin")
    refused(full, "pytorch_model_fsdp.bin")
    assert not trap.exists()


# Names of other versions -----------------------------------------------------------------


def to_4_51(key: str) -> str:
    return key.replace("model.model.language_model.", "model.model.").replace(
        "model.model.visual.", "model.visual."
    )


def test_an_adapter_of_transformers_4_51_keeps_each_modules_rank_and_alpha(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = get_peft_model(
        Qwen2VLForConditionalGeneration.from_pretrained(world / "base"),
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=r"(model\.language_model\.layers|model\.visual\.blocks).*\.(q_proj|qkv|down_proj)",
            rank_pattern={"model.language_model.layers.1.self_attn.q_proj": 2},
            alpha_pattern={"model.language_model.layers.0.self_attn.q_proj": 3},
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    present, old = tmp_path / "present", tmp_path / "old"
    model.save_pretrained(str(present))
    shutil.copytree(present, old)
    tensors = load_file(old / "adapter_model.safetensors")
    save_file({to_4_51(key): tensor for key, tensor in tensors.items()}, old / "adapter_model.safetensors")
    config = (old / "adapter_config.json").read_text()
    config = config.replace("model.language_model.", "model.").replace("model.visual", "visual")
    config = config.replace("model\\\\.language_model\\\\.", "model\\\\.").replace(
        "model\\\\.visual", "visual"
    )
    (old / "adapter_config.json").write_text(config)

    done = consolidate(old, tmp_path / "adapter")
    print_consolidated(done, Console(width=200))
    assert f"{len(tensors) // 2} of them under names of an older transformers" in capsys.readouterr().out
    assert done.adapter.config["base_model_name_or_path"] == str(world / "base")
    expected, found = (
        PeftModel.from_pretrained(
            Qwen2VLForConditionalGeneration.from_pretrained(world / "base"), str(folder)
        )
        .merge_and_unload()
        .state_dict()
        for folder in (present, tmp_path / "adapter")
    )
    assert_same(found, expected)


def test_wrappers_and_adapter_names_are_taken_off_keys() -> None:
    key = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
    for raw in (
        key,
        "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.default.weight",
        "model." + key,
        "module._orig_mod." + key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        "_fsdp_wrapped_module." + key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        key.removeprefix("base_model.model."),
        to_4_51(key),
    ):
        assert adapter_key(raw)[0] == key
    assert (
        adapter_key("base_model.model.lm_head.modules_to_save.default.weight")[0]
        == "base_model.model.lm_head.weight"
    )


def test_of_a_whole_models_state_the_adapter_alone_is_taken() -> None:
    prefix = "base_model.model."
    keys = [
        prefix + "model.language_model.layers.0.self_attn.q_proj.base_layer.weight",
        prefix + "model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight",
        prefix + "model.language_model.norm.weight",
        prefix + "lm_head.original_module.weight",
        prefix + "lm_head.modules_to_save.default.weight",
    ]
    assert list(adapter_keys(keys, "here")) == [keys[1], keys[4]]
    with pytest.raises(CheckpointError, match="holds 2 adapters"):
        adapter_keys([keys[1], keys[1].replace("default", "other")], "here")


def test_parameters_are_numbered_in_the_models_order_not_the_names(world: Path) -> None:
    model = get_peft_model(
        Qwen2VLForConditionalGeneration.from_pretrained(world / "base"),
        LoraConfig(r=2, target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"]),
    )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    keys = list(get_peft_model_state_dict(model, save_embedding_layers=False))
    assert [parameter_name(key) for key in parameter_order(sorted(keys)) or []] == trained
    assert parameter_order([*keys, "base_model.model.transformer.h.0.attn.lora_A.weight"]) is None


def test_our_own_checkpoint_gives_adapter_moments_and_step(foreign: Path, tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(foreign / "ddp" / STEP / name, aside)
    optimizer_state = import_checkpoint(foreign / "ddp" / STEP).optimizer_state
    save_file(optimizer_state, aside / "optimizer.safetensors")
    publish(aside, tmp_path / "checkpoint-3", {"step": 3})
    found = import_checkpoint(tmp_path / "checkpoint-3")
    assert (found.form, found.step, found.lost) == ("checkpoint of samestep", 3, ())
    assert_same(found.optimizer_state, optimizer_state)
    (tmp_path / "checkpoint-3/optimizer.safetensors").write_bytes(b"x")
    refused(tmp_path / "checkpoint-3", "optimizer.safetensors")


def test_what_a_state_of_8_bit_moments_cannot_give_is_said(foreign: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(foreign / "ddp" / STEP, tmp_path / "own"))
    state = torch.load(own / "optimizer.pt", weights_only=True)
    for values in state["state"].values():
        values["state1"] = values.pop("exp_avg")
    torch.save(state, own / "optimizer.pt")
    assert import_checkpoint(own).lost == ("the optimizer's moments",)
    assert json.loads((own / "trainer_state.json").read_text())["global_step"] == import_checkpoint(own).step
