"""Merging a base of the 7B shape: peak memory and time, against a plain copy of its files and against PEFT's own way.

    python benchmarks/merge.py [--layers 28] [--work DIR] [--keep]

Writes a base of random bf16 weights (16.6 GB with 28 layers, in files of at most 4 GB as the hub has them) and an
adapter of r 8 on q_proj and v_proj to DIR (default: a temporary folder, removed at the end), and measures, each in a
process of its own and with the base out of the page cache: a copy with fsync, our merge onto the original and onto
the dequantized base, and PEFT's merge_and_unload with save_pretrained (without fsync). Every output is removed before
the next. PEFT's way holds the model in memory: when less than 1.5 GB are left on the machine it is ended, and so
reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHARD_BYTES = 4 * 10**9
ENOUGH_KIB = 1_500_000  # of free memory; below it a child is ended
WAYS = ("copy", "samestep original", "samestep dequantized", "peft")


@dataclass(frozen=True)
class Measured:
    """One way of one merge. `peak_gb`: resident memory, file pages it maps included."""

    way: str
    seconds: float
    peak_gb: float
    ended: str


def write_base(folder: Path, layers: int) -> None:
    """Files of random bf16 weights with the names and shapes of Qwen2-VL-7B, `layers` of its 28 layers."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from trainer.embedded.tiny_model import random_tiny

    random_tiny(folder)  # for processor and tokenizer
    (folder / "model.safetensors").unlink()
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": layers, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, dtype="bfloat16"
    )
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    shapes = {hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards = list(split(shapes))
    weight_map = {}
    block = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    content = block.view(torch.uint8).numpy().data
    for number, names in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(file, {name: shapes[name] for name in names}, content)
        weight_map |= dict.fromkeys(names, file.name)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def hub_name(name: str) -> str:
    """As the hub's files call a tensor that transformers 5 calls `name`."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def split(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names in files of at most SHARD_BYTES."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        own = 2 * math.prod(shape)
        if names and size + own > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    yield names


def write_shard(file: Path, shapes: dict[str, tuple[int, ...]], content: memoryview) -> None:
    """A safetensors file, a block at a time: no tensor is ever whole in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        left = offset
        while left:
            left -= target.write(content[: min(left, len(content))])
        target.flush()
        os.fsync(target.fileno())


def write_adapter(folder: Path, base: Path, layers: int) -> None:
    """r 8 on q_proj and v_proj, random."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for module, out in (("q_proj", 3584), ("v_proj", 512)):
            prefix = f"base_model.model.model.language_model.layers.{layer}.self_attn.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, 3584, generator=draw) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, 8, generator=draw) * 0.02
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        base_model_name_or_path=str(base), inference_mode=True,
    ).save_pretrained(folder)  # fmt: skip


def write_recipe(file: Path, base: Path) -> None:
    """The default recipe, which says how the base was quantized."""
    from launch.recipe.loading import dump_recipe, find_recipe, load_recipe

    recipe = load_recipe(find_recipe("qwen2vl_7b_chartqa"), [f"model.name_or_path={base}"])
    file.write_text(dump_recipe(recipe))


def do(way: str, work: Path, output: Path) -> None:
    """One way, in this process."""
    base, adapter = work / "base", work / "adapter"
    if way == "copy":
        output.mkdir()
        for file in sorted(base.iterdir()):
            with file.open("rb") as source, (output / file.name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
                target.flush()
                os.fsync(target.fileno())
    elif way == "peft":
        import torch
        from peft import PeftModel
        from transformers import Qwen2VLForConditionalGeneration

        model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        merged.save_pretrained(output, max_shard_size="4GB")
    else:
        from trainer.export.merge import main as merge

        kind = way.removeprefix("samestep ")
        recipe = ["--recipe", str(work / "recipe.yaml")] if kind == "dequantized" else []
        status = merge([str(adapter), "--output", str(output), "--base", kind, *recipe])
        if status:
            sys.exit(status)


def measure(way: str, work: Path) -> Measured:
    """One way in a child; its output is removed."""
    output = work / "output"
    for file in (work / "base").iterdir():  # out of the page cache, for all alike
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.monotonic()
    command = [sys.executable, __file__, "--work", str(work), "--do", way]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    ended, seen = "", 0
    while child.poll() is None:
        if available_kib() < ENOUGH_KIB:
            ended = f"ended: {available_kib() / 1e6:.1f} GB of memory were left on the machine"
            child.kill()
        seen = max(seen, peak_kib(str(child.pid)))
        time.sleep(0.1)
    words = child.stdout.read() if child.stdout else ""
    seconds = time.monotonic() - begin
    peak = next((json.loads(line)["peak_kib"] for line in words.splitlines() if '"peak_kib"' in line), None)
    if peak is None:
        peak = seen
        ended = ended or f"failed with status {child.returncode}"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name("output.partial"), ignore_errors=True)
    return Measured(way, round(seconds, 1), round(peak * 1024 / 1e9, 2), ended)


def peak_kib(process: str) -> int:
    """The most resident memory a process has had (VmHWM; getrusage would count what its parent had at the fork)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def available_kib() -> int:
    """Memory that programs can still have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def main() -> None:
    """The table, then the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=28, help="of the language model; 28 is the 7B")
    parser.add_argument("--work", type=Path, help="an empty or new folder with twice the base's room")
    parser.add_argument("--keep", action="store_true", help="leave the base for another run")
    parser.add_argument("--do", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.do:
        do(given.do, given.work, given.work / "output")
        print(json.dumps({"peak_kib": peak_kib("self")}))
        return
    from rich.console import Console
    from rich.table import Table

    work: Path = given.work or Path(tempfile.mkdtemp(prefix="merge-"))
    work.mkdir(parents=True, exist_ok=True)
    new = not any(work.iterdir())  # what lay there is not ours to remove
    try:
        if not (work / "recipe.yaml").is_file():
            write_base(work / "base", given.layers)
            write_adapter(work / "adapter", work / "base", given.layers)
            write_recipe(work / "recipe.yaml", work / "base")
        sizes = [file.stat().st_size for file in (work / "base").glob("*.safetensors")]
        measured = []
        for way in WAYS:
            measured.append(measure(way, work))
            print(measured[-1], file=sys.stderr, flush=True)
    finally:
        if not given.keep and new:
            shutil.rmtree(work)
    title = f"{sum(sizes) / 1e9:.1f} GB in {len(sizes)} files, the largest {max(sizes) / 1e9:.2f} GB"
    table = Table("way", "seconds", "peak GB", "peak / largest file", "", title=title, title_justify="left")
    for each in measured:
        table.add_row(
            each.way,
            f"{each.seconds:.1f}",
            f"{each.peak_gb:.2f}",
            f"{each.peak_gb * 1e9 / max(sizes):.2f}",
            each.ended,
        )
    Console(highlight=False).print(table)
    facts = {"bytes": sum(sizes), "largest_file": max(sizes), "cpus": os.cpu_count()}
    print(json.dumps({**facts, "ways": [asdict(each) for each in measured]}))


if __name__ == "__main__":
    main()
