"""What others wrote is read without waiting, within bounds, inside of its folder, and without running any of it."""

from __future__ import annotations

import collections
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from launch.errors import CheckpointError, ConfigError, SamestepError
from launch.recipe.schema import Recipe
from tests.conftest import chart_rows, recipe_values, write_charts
from tests.helpers.merging import change_config, make_adapter, rename_keys
from trainer.export.adapter import read_adapter
from trainer.export.adapter_config import refuse_endless_patterns
from trainer.export.base_model import find_base
from trainer.formats.dcp import distributed_keys, load_distributed
from trainer.formats.detect import import_checkpoint
from trainer.formats.portable import TrainedState
from trainer.formats.safetensors_blocks import block_rows, read_base_shards, read_shard
from trainer.formats.sharded import DcpRankState
from trainer.formats.torch_files import load_torch
from trainer.logging_setup import print_error, setup_logging
from trainer.model.base import load_base
from trainer.prepare import prepare
from trainer.pretrained import load_processor
from trainer.sandbox import trial
from trainer.vision_cache.file import FlawError, Kind, read


@contextmanager
def refused(kind: type[SamestepError], *words: str) -> Iterator[None]:
    """At once, in words that every terminal takes."""
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        yield
    assert time.monotonic() - began < 20
    text = str(caught.value)
    assert "\x1b" not in text
    for word in words:
        assert word in text, text


@pytest.fixture
def base(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "base", tmp_path / "base"))


def on(world: Path, base: Path | None = None, charts: Path | None = None, **data: Any) -> Recipe:
    values = recipe_values(world)
    values["model"]["name_or_path"] = str(base or world / "base")
    values["data"] |= {"dataset": str(charts or world / "charts"), **data}
    return Recipe.model_validate(values)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


# Work that files ask for --------------------------------------------------------------------


def test_work_without_an_end_is_ended_and_said() -> None:
    assert trial(lambda: re.match(r"(a+)+$", "a" * 60 + "b"), 1) == "it takes more than 1 s"
    assert trial(lambda: 10**10**10, 1) is not None
    assert trial(lambda: "a" * 2**33) == "it needs more than 1024 MiB of memory"
    assert trial(lambda: json.loads("[")) == "JSONDecodeError: Expecting value: line 1 column 2 (char 1)"
    assert trial(lambda: json.loads("[]")) is None


def test_a_machine_with_a_limit_of_its_own_still_tries() -> None:
    program = """
import psutil, resource
from trainer.sandbox import trial
size = psutil.Process().memory_info().vms + 2**28
resource.setrlimit(resource.RLIMIT_AS, (size, size))
print(trial(lambda: None))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
        ("{{ 'x' * 9000000000 }}", "memory"),
        ("{% for a in range(99999) %}abcdef{% endfor %}", "599,994 characters"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('\x1b[2J') }}", "\\x1b[2J"),
    ],
)
def test_a_chat_template_that_does_not_end_is_refused_by_its_file(
    world: Path, base: Path, template: str, words: str
) -> None:
    (base / "chat_template.jinja").write_text(template)
    with refused(ConfigError, "chat_template.jinja: the chat template cannot be used", words):
        load_processor(on(world, base))


def test_patterns_of_an_adapter_that_do_not_end_are_refused_by_its_file(world: Path, tmp_path: Path) -> None:
    own = make_adapter(world / "base", tmp_path / "own")
    endless = r"(([a-z_.0-9]+)+)+!"
    for key, value in {"rank_pattern": {endless: 4}, "target_modules": endless}.items():
        before = json.loads((own / "adapter_config.json").read_text())
        change_config(own, **{key: value})
        with refused(CheckpointError, "adapter_config.json: its patterns", "more than 2 s"):
            read_adapter(own)
        (own / "adapter_config.json").write_text(json.dumps(before))
    change_config(own, modules_to_save=[endless])
    with refused(CheckpointError, "adapter_config.json: modules_to_save", "no name of a module"):
        read_adapter(own)


def test_patterns_that_peft_writes_are_read(world: Path, tmp_path: Path) -> None:
    own = make_adapter(
        world / "base",
        tmp_path / "own",
        target_modules=r".*layers\.\d+\.self_attn\.(q|v)_proj",
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 2, "v_proj": 3},
        alpha_pattern={"^model.language_model.layers.1.*q_proj": 7},
    )
    ranks = {pair.module.split("layers.")[1]: (len(pair.a), pair.scaling) for pair in read_adapter(own).pairs}
    assert ranks["0.self_attn.q_proj"] == (2, 8)
    assert ranks["0.self_attn.v_proj"][0] == 3


def test_a_rank_and_an_alpha_for_every_module_of_a_large_model_are_no_endless_patterns() -> None:
    linears = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    layers = [f"model.language_model.layers.{layer}" for layer in range(120)]
    names = [f"{layer}.{linear}_proj" for layer in layers for linear in linears]
    values = dict.fromkeys(names, 4)
    refuse_endless_patterns(Path(), {"rank_pattern": values, "alpha_pattern": values}, names)


# Code ---------------------------------------------------------------------------------------


def test_code_in_a_base_is_never_run_and_nobody_is_asked(
    world: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    (base / "own_code.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "class Own:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
    )
    file = base / "processor_config.json"
    values = json.loads(file.read_text()) if file.is_file() else {}
    auto = dict.fromkeys(("AutoProcessor", "AutoTokenizer", "AutoImageProcessor"), "own_code.Own")
    file.write_text(json.dumps(values | {"processor_class": "Own", "auto_map": auto}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with refused(ConfigError, "model.name_or_path: no processor can be loaded", "not run"):
        load_processor(on(world, base))
    (base / "generate.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (base / "custom_generate").mkdir()
    shutil.move(base / "generate.py", base / "custom_generate/generate.py")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own_code.Own", "AutoModel": "own_code.Own"}
    (base / "config.json").write_text(json.dumps(config))
    assert load_base(on(world, base), torch.device("cpu")).config.model_type == "qwen2_vl"
    assert not marker.exists()
    assert sys.stdin.read() == "y\n" * 9


def test_a_child_has_nothing_to_read() -> None:
    program = (
        "import sys; from launch.subprocesses import wait_for\n"
        "sys.exit(wait_for([sys.executable, '-c', 'import sys; sys.exit(len(sys.stdin.read()))']).status)"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, input="y\n", text=True, timeout=60, check=False).returncode == 0


# A base's folder ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "vocab.json"]
)
def test_a_base_with_a_pipe_or_a_device_is_refused_by_the_file(
    world: Path, base: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(base / name)
    recipe = on(world, base)
    with refused(ConfigError, name if name != "config.json" else "config.json"):
        load_processor(recipe)
    with refused(ConfigError, name):
        load_base(recipe, torch.device("cpu"))
    with refused(SamestepError, name):
        find_base(read_adapter(make_adapter(world / "base", base.parent / "adapter")), str(base))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 (at most 1,000)"),
        ("config.json", {"text_config": {"vocab_size": 1e300}}, "vocab_size: 1e+300"),
        ("config.json", {"vision_config": {"depth": -1}}, "depth: -1"),
        ("config.json", "[" * 100_000, "config.json"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json"),
        ("generation_config.json", "\x00", "generation_config.json"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "outside of its folder"),
        ("model.safetensors.index.json", {"weight_map": {"a": "/etc/passwd"}}, "(/etc/passwd)"),
        ("model.safetensors.index.json", {"weight_map": {"a": "\x1b/../../x"}}, "(\\x1b/../../x)"),
    ],
)
def test_a_base_that_says_what_cannot_be_is_refused_by_the_file(
    world: Path, base: Path, name: str, content: Any, words: str
) -> None:
    if isinstance(content, dict):
        before = json.loads((base / name).read_text()) if (base / name).is_file() else {}
        content = json.dumps(before | content)
    (base / name).write_text(content)
    with refused(ConfigError, f"model.name_or_path: {base / name}", words):
        load_processor(on(world, base))


def test_links_into_the_hubs_cache_are_followed(world: Path, base: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in base.iterdir():
        file.rename(blobs / file.name)
        file.symlink_to(f"../blobs/{file.name}")
    assert load_processor(on(world, base)).tokenizer is not None


# Images and tables --------------------------------------------------------------------------


def test_an_image_path_that_is_a_device_or_a_pipe_is_a_bad_row(world: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    rows = chart_rows(6, 1)
    (tmp_path / "good.png").write_bytes(rows[3]["image"]["bytes"])
    for number, path in enumerate(["/dev/zero", str(tmp_path / "pipe.png"), str(tmp_path)]):
        rows[number]["image"] = {"bytes": None, "path": path}
    rows[3]["image"] = {"bytes": None, "path": str(tmp_path / "good.png")}
    splits = {"train": rows, "val": chart_rows(2, 2), "test": chart_rows(2, 3)}
    charts = write_charts(tmp_path / "charts", splits)
    with refused(
        ConfigError, "3 bad rows", "train row 0: the image", "train row 1: the image", "train row 2"
    ):
        prepare(on(world, charts=charts), quiet=True)
    index = prepare(on(world, charts=charts, on_bad_row="drop"), quiet=True)
    assert index.splits["train"].rows.tolist() == [3, 4, 5]


def test_a_table_that_is_a_pipe_is_refused_by_its_name(world: Path, tmp_path: Path) -> None:
    charts = write_charts(tmp_path / "charts", {"train": chart_rows(2, 1), "val": chart_rows(2, 2)})
    os.mkfifo(charts / "test-00000.parquet")
    with refused(ConfigError, "test-00000.parquet"):
        prepare(on(world, charts=charts), quiet=True)


def test_features_that_are_no_plain_file_are_a_flaw(tmp_path: Path) -> None:
    kind = Kind(b"k" * 16, torch.float32, 8, 2)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    for name, words in {"pipe": "no plain file", "device": "no plain file", "sparse": "too large"}.items():
        with pytest.raises(FlawError, match=words):
            read(tmp_path / name, kind, "ab" * 32)


# Checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pipe, device])
def test_a_file_of_a_checkpoint_that_is_no_plain_file_is_refused_by_its_name(
    world: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    own = make_adapter(world / "base", tmp_path / "own")
    torch.save({}, own / "optimizer.pt")
    (own / "trainer_state.json").write_text('{"global_step": 3}')
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        copy = Path(shutil.copytree(own, tmp_path / f"copy-{name}"))
        make(copy / name)
        if name in ("optimizer.pt", "trainer_state.json"):
            assert import_checkpoint(copy).lost  # what is no plain file is not there
        else:
            with refused(CheckpointError):
                read_adapter(copy)
        with refused(CheckpointError, name):
            read_adapter(copy / name)
    zero = tmp_path / "global_step3"
    zero.mkdir()
    make(zero / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with refused(CheckpointError, "optim_states.pt: cannot be read (is no plain file"):
        read_adapter(zero)
    make(zero / "latest")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"../../elsewhere", ("latest: names a file outside of its folder", "../../elsewhere")),
        (b"/etc", ("latest: names a file outside",)),
        (b"a\x1b[2J\nerror: b", ("a\\x1b[2J\\nerror: b, which is missing",)),
        (None, ("latest: is too large (6,442,450,944 bytes",)),
    ],
)
def test_latest_leads_nowhere_else_and_is_a_name(
    tmp_path: Path, content: bytes | None, words: tuple[str, ...]
) -> None:
    for name in ("latest", "latest_universal"):
        with (tmp_path / name).open("wb") as file:
            file.write(content or b"")
            if content is None:
                file.truncate(6 * 2**30)
        if name == "latest" or content != b"a\x1b[2J\nerror: b":
            with refused(CheckpointError, *(word.replace("latest:", f"{name}:") for word in words)):
                import_checkpoint(tmp_path)
        (tmp_path / name).unlink()


def test_a_count_of_ranks_is_not_believed(tmp_path: Path) -> None:
    state = {"optimizer_state_dict": {"zero_stage": 2, "partition_count": 10**12}}
    torch.save(state, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with refused(CheckpointError, "999999999999 of 1000000000000 ranks' files are missing", "..."):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize("size", [(10**15,), (-1,), ("a",), (2**70, 2)])
def test_shapes_that_the_vectors_do_not_hold_are_refused(tmp_path: Path, size: tuple[Any, ...]) -> None:
    own = {
        "zero_stage": 2,
        "partition_count": 1,
        "single_partition_of_fp32_groups": [torch.zeros(4)],
        "param_alignment_paddings": "x",
    }
    torch.save({"optimizer_state_dict": own}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"param_shapes": [{"a": size}]}, tmp_path / "mp_rank_00_model_states.pt")
    with refused(CheckpointError, str(tmp_path)):
        import_checkpoint(tmp_path)


def test_a_universal_checkpoint_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "zero").mkdir()
    torch.save({"param_shapes": [{"../../a": (1,)}]}, tmp_path / "mp_rank_00_model_states.pt")
    with refused(CheckpointError, "names a file outside of its folder (../../a)"):
        import_checkpoint(tmp_path)


def test_a_file_of_torch_that_says_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "optimizer.bin"
    torch.save({"a": torch.zeros(2**20)}, file)
    with zipfile.ZipFile(file) as stored:
        members = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name, content in members.items():
            deflated.writestr(name, content)
    with refused(CheckpointError, "optimizer.bin: cannot be read (its members would expand to 4,19"):
        load_torch(file)
    torch.save({"a": [torch.zeros(1).expand(10**12)]}, file)
    with refused(CheckpointError, "a tensor of 4,000,000,000,000 bytes, of which 4 are stored"):
        load_torch(file)
    lists: list[Any] = []
    for _ in range(60):
        lists = [lists, lists]
    torch.save({"a": lists}, file)
    assert list(load_torch(file)) == ["a"]
    file.write_bytes(b"PK\x05\x06" + bytes(8) + (2**31).to_bytes(4, "little") + bytes(6))
    with refused(CheckpointError, "optimizer.bin: cannot be read"):
        load_torch(file)
    file.write_bytes(b"\x80\x02\x8e" + (2**60).to_bytes(8, "little"))
    with refused(CheckpointError, "optimizer.bin: cannot be read"):
        load_torch(file)


def written(folder: Path) -> Path:
    """A distributed checkpoint of two tensors."""
    folder.mkdir()
    tensors = {"a.lora_A.default.weight": torch.ones(2, 3), "b": torch.zeros(5)}
    DcpRankState(TrainedState(tensors, {})).write(folder, None)
    assert load_distributed(folder, ["b"])["b"].tolist() == [0.0] * 5
    return folder


def rewritten(folder: Path, change: Callable[[metadata.Metadata], object]) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    change(found)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


def place(found: metadata.Metadata, name: str, **values: Any) -> None:
    for index, stored in found.storage_data.items():
        if index.fqn == name:
            found.storage_data[index] = _StorageInfo(**{**vars(stored), **values})


def resize(found: metadata.Metadata, name: str, *size: int) -> None:
    kind = found.state_dict_metadata[name]
    assert isinstance(kind, metadata.TensorStorageMetadata)
    kind.size = torch.Size(size)
    kind.chunks = [metadata.ChunkStorageMetadata(torch.Size([0] * len(size)), kind.size)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: place(found, "b", relative_path="../x"), "outside of its folder (../x)"),
        (lambda found: place(found, "b", relative_path="/etc/passwd"), "outside of its folder (/etc/passwd)"),
        (lambda found: place(found, "b", length=10**12), "is cut short"),
        (lambda found: place(found, "b", length="x"), ".metadata: cannot be read (it holds no place of"),
        (lambda found: place(found, "b", offset=-1), ".metadata: cannot be read (it holds no place of"),
        (lambda found: resize(found, "b", 10**12), "b is said to have 4,000,000,000,000 bytes, of which"),
        (lambda found: setattr(found, "storage_data", None), "names no tensors and no files"),
        (lambda found: setattr(found, "state_dict_metadata", [1]), "names no tensors and no files"),
        (lambda found: vars(found).clear(), "names no tensors and no files"),
        (lambda found: found.state_dict_metadata["b"].chunks.clear(), "are 0 numbers of 5"),
    ],
)
def test_metadata_that_its_files_do_not_bear_out_are_refused(
    tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    folder = written(tmp_path / "dcp")
    rewritten(folder, change)
    for look in (distributed_keys, lambda folder: load_distributed(folder, ["b"]), import_checkpoint):
        with refused(CheckpointError, words):
            look(folder)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps({"a": 1}), "it holds a dict, no Metadata"),
        (pickle.dumps(metadata.StorageMeta()), "it holds a StorageMeta, no Metadata"),
        (pickle.dumps(collections.Counter()), "it holds a collections.Counter"),
        (pickle.dumps(os.getcwd), "it holds a posix.getcwd"),
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"), "cannot be read"),
        (b"\x80\x04Nr" + (2**31 - 1).to_bytes(4, "little") + b".", "it holds a NoneType"),
        (b"", "cannot be read"),
        (b"\x80\x04" + b"]\x94" * 5 + b"." * 3, "no Metadata"),
    ],
)
def test_metadata_of_another_kind_are_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    folder = written(tmp_path / "dcp")
    (folder / ".metadata").write_bytes(content)
    with refused(CheckpointError, "/.metadata: cannot be read (", words):
        import_checkpoint(folder)


def test_metadata_that_are_too_large_or_a_pipe_are_one_line(tmp_path: Path) -> None:
    folder = written(tmp_path / "pytorch_model_fsdp_0")
    with (folder / ".metadata").open("wb") as file:
        file.truncate(2**36)
    with refused(CheckpointError, ".metadata: cannot be read (is too large"):
        import_checkpoint(folder)
    pipe(folder / ".metadata")
    with refused(CheckpointError, ".metadata: cannot be read (is no plain file"):
        import_checkpoint(folder)


def test_a_deflated_part_of_a_distributed_checkpoint_is_not_expanded(tmp_path: Path) -> None:
    folder = written(tmp_path / "dcp")
    part = next(folder.glob("*.distcp"))
    content = io.BytesIO()
    torch.save(torch.zeros(5), content)
    deflated = io.BytesIO()
    with zipfile.ZipFile(content) as stored, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as out:
        for name in stored.namelist():
            out.writestr(name, stored.read(name) + bytes(2**20))
    part.write_bytes(part.read_bytes() + deflated.getvalue())
    begin, length = part.stat().st_size - len(deflated.getvalue()), len(deflated.getvalue())
    rewritten(folder, lambda found: place(found, "b", offset=begin, length=length))
    with refused(CheckpointError, "its members would expand"):
        load_distributed(folder, ["b"])


# Safetensors --------------------------------------------------------------------------------


def safetensors(path: Path, header: object, data: int = 0) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def test_a_safetensors_header_is_bounded(world: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "adapter_model.safetensors"
    with sparse.open("wb") as file:
        file.write((5 * 2**30).to_bytes(8, "little"))
        file.truncate(6 * 2**30)
    with refused(CheckpointError, "its safetensors header is said to have 5,368,709,120 bytes"):
        read_shard(sparse)
    shutil.copy(make_adapter(world / "base", tmp_path / "a") / "adapter_config.json", tmp_path)
    with refused(CheckpointError, "adapter_model.safetensors"):
        read_adapter(tmp_path)
    deep = safetensors(tmp_path / "deep", {})
    deep.write_bytes((99_999).to_bytes(8, "little") + b"[" * 99_999)
    with refused(CheckpointError, "deep: unreadable safetensors header (nested too deeply"):
        read_shard(deep)


def test_tensors_of_a_safetensors_file_follow_each_other(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    with refused(CheckpointError, "\\x1bb begins at byte 0 where the one before ends at 16"):
        read_shard(safetensors(tmp_path / "twice", {"a": one, "\x1bb": one}, 16))
    empty = {"dtype": "F32", "shape": [10**15, 0], "data_offsets": [0, 0]}
    shard = read_shard(safetensors(tmp_path / "empty", {"a": empty}))
    assert list(block_rows(shard.entries["a"])) == []


def test_a_tensor_larger_than_memory_is_refused(tmp_path: Path) -> None:
    size = 2**42
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    file = safetensors(tmp_path / "a.safetensors", {"base_model.model.x.lora_A.weight": entry})
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size + size)
    with refused(CheckpointError, "a.safetensors: "):  # by the system, or by us where it promises everything
        import_checkpoint(file)


def test_the_index_of_weights_leads_nowhere_else(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors"), "a/../../x.safetensors"):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        for look in (import_checkpoint, read_base_shards):
            with refused(CheckpointError, "index.json: names a file outside of its folder"):
                look(folder)  # type: ignore[operator]


# What is printed ----------------------------------------------------------------------------


def test_names_of_others_do_not_move_the_terminal(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_adapter(world / "base", tmp_path / "own")
    change_config(own, base_model_name_or_path="/no\x1b[2J\nerror: all is well")
    with pytest.raises(CheckpointError) as caught:
        find_base(read_adapter(own))
    assert str(caught.value).splitlines() == [str(caught.value)]
    assert "/no\\x1b[2J\\nerror: all is well: no such folder" in str(caught.value)
    change_config(own, base_model_name_or_path="own er/\x1b[2J")
    with refused(CheckpointError, "--base-model: own er/\\x1b[2J is no folder and no hub id"):
        find_base(read_adapter(own))
    rename_keys(own, lambda key: key.replace("q_proj", "q_proj\nerror: all is well"))
    with refused(CheckpointError, "q_proj\\nerror: all is well"):
        read_adapter(own)
    capsys.readouterr()
    print_error(CheckpointError("a\x1b[2J\nb\x07"))
    assert capsys.readouterr().err == "error: a\\x1b[2J\nb\\x07\n"
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    setup_logging()
    logging.getLogger("trainer").warning("loss of %s", "\x1b[2J")
    assert "loss of \\x1b[2J" in capsys.readouterr().err
