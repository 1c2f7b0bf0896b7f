"""A checkpoint of any form -> an adapter folder that `PeftModel.from_pretrained` loads.

    python -m trainer.export.consolidate CHECKPOINT --output DIR [--adapter-config FILE | --lora-alpha N]

CHECKPOINT is one of ours, or one that plain transformers, trl, accelerate or DeepSpeed wrote: of DDP or one process,
FSDP (sharded, or in one file), ZeRO-1 to 3, a universal checkpoint, `accelerate merge-weights`, `zero_to_fp32.py`.
One CPU and no process group are enough. Keys of older transformers get their present names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file

from launch.checkpoints.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from launch.console import add_row
from launch.errors import CheckpointError, SamestepError
from launch.option_values import add_option, place, positive
from launch.run.output_folder import refuse_place
from trainer.export.adapter import Adapter, AdapterOverrides, adapter_of, read_adapter
from trainer.export.adapter_config import written_module
from trainer.export.output_folder import atomic_output
from trainer.formats.detect import import_checkpoint
from trainer.formats.imported import ImportedCheckpoint
from trainer.formats.validated import read_tensors
from trainer.logging_setup import print_error, setup_logging


@dataclass(frozen=True)
class Consolidated:
    """The checkpoint that was read, and where the adapter lies now."""

    imported: ImportedCheckpoint
    adapter: Adapter
    output: Path


def consolidate(source: Path, output: Path, missing: AdapterOverrides | None = None) -> Consolidated:
    """Write the adapter of a checkpoint of any form as a PEFT adapter folder, and compare what was written.

    Raises:
        CheckpointError: the checkpoint cannot be read whole (then nothing is written), or the file read back differs.
    """
    output = output.expanduser().absolute()
    refuse_place(output, 0)
    imported = import_checkpoint(source)
    adapter = adapter_of(imported, missing or AdapterOverrides())
    refuse_place(output, sum(tensor.nbytes for tensor in adapter.tensors.values()) + 2**20)
    with atomic_output(output) as tmp_dir:
        write_adapter(adapter, tmp_dir)
    return Consolidated(imported, adapter, output)


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, read back and compared."""
    tensors = {key: tensor.contiguous().clone() for key, tensor in adapter.tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
    written = read_tensors(folder / ADAPTER_WEIGHTS)
    differing = [key for key, tensor in tensors.items() if not _same(tensor, written.get(key))]
    again = read_adapter(folder)
    if differing or len(again.pairs) != len(adapter.pairs):
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS}: {len(differing)} of {len(tensors)} tensors were not written as they are; "
            "the disk may be faulty, write to another place"
        )


def _same(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


def print_consolidated(done: Consolidated, console: Console) -> None:
    """Print the form, what is in the adapter, and what the checkpoint does not hold."""
    imported, adapter = done.imported, done.adapter
    table = Table(title=Text(f"adapter: {done.output}"), show_header=False, title_justify="left")
    add_row(table, "found", f"{imported.form} in {imported.source}")
    renamed = sum(written_module(imported, pair.module) != pair.module for pair in adapter.pairs)
    names = f", {renamed} of them under names of an older transformers" if renamed else ""
    add_row(table, "lora pairs", f"{len(adapter.pairs)}{names}")
    if adapter.saved:
        add_row(table, "saved whole", f"{len(adapter.saved)} tensors of modules_to_save")
    if silent := adapter.silent:
        add_row(table, "untrained", f"{len(silent)} pairs are zero ({', '.join(silent[:3])})")
    add_row(table, "r, lora_alpha", f"{adapter.config['r']}, {adapter.config['lora_alpha']}")
    add_row(table, "base", str(adapter.base or "not named; give it when you load or merge"))
    add_row(table, "step", "not known" if imported.step is None else str(imported.step))
    add_row(
        table,
        "optimizer",
        f"moments of {len(imported.optimizer_state) // 3} parameters"
        if imported.optimizer_state
        else "no moments",
    )
    console.print(table)


def add_adapter_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for values that a checkpoint may lack."""
    add_option(
        parser,
        "--adapter-config",
        place,
        help="adapter_config.json (or its folder) of a checkpoint without one",
    )
    add_option(parser, "--lora-alpha", positive, help="of a checkpoint without adapter_config.json")
    parser.add_argument(
        "--base-model", help="folder or hub id of the unquantized base; default: the one the adapter names"
    )


def missing_of(options: argparse.Namespace) -> AdapterOverrides:
    """Return the values of `add_adapter_options`."""
    return AdapterOverrides(options.adapter_config, options.lora_alpha, options.base_model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export.consolidate",
        description="Make a PEFT adapter folder of a checkpoint of any form, on one CPU.",
        epilog="example: python -m trainer.export.consolidate old_run/checkpoint-500 --output adapter",
    )
    add_option(parser, "source", place, help="the checkpoint")
    add_option(parser, "--output", place, required=True, help="folder to write; must not exist")
    add_adapter_options(parser)
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        done = consolidate(options.source, options.output, missing_of(options))
    except SamestepError as error:
        return print_error(error)
    print_consolidated(done, Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
