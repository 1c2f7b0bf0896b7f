"""Adapter + base -> merged model, block by block, proven by reading back.

    python -m trainer.export.merge SOURCE --output DIR [--base original|dequantized] [--base-model PATH]

SOURCE is a run directory, a checkpoint of any form or a PEFT adapter folder. The weights that are written are never
quantized: merging into 4-bit weights would round the sum to 4 bits again. `--base original` adds to the unquantized
base, `--base dequantized` to its weights rounded to 4 bits and back, against which a 4-bit run trained. Every lora
pair must hit exactly one tensor of the base and change it; every other tensor keeps its bytes, or is only converted to
the type that `--dtype` asks for. The result has the base's file and tensor names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from launch.console import add_row
from launch.errors import SamestepError
from launch.option_values import add_option, place
from launch.recipe.loading import find_recipe
from launch.run.merge_options import BaseKind, DtypeChoice
from launch.run.merged_model import RECORD
from trainer.export.adapter import AdapterOverrides
from trainer.export.base_model import add_allow
from trainer.export.consolidate import add_adapter_options, missing_of
from trainer.export.merge_plan import CARD, MergePlan, MergeRequest, plan_merge
from trainer.export.model_card import merge_record, model_card
from trainer.export.output_folder import atomic_output
from trainer.export.own_template import write_template
from trainer.export.verify import BaseRows, MergeReport, verify_merged
from trainer.formats.safetensors_blocks import FLOATS, INDEX_FILE, SAFETENSORS_DTYPES, write_shard
from trainer.formats.validated import read_json_object
from trainer.logging_setup import print_error, setup_logging


def merge(request: MergeRequest) -> MergeReport:
    """Merge an adapter into its base and publish the verified result as `request.output`.

    Raises:
        CheckpointError: the request cannot be met (then nothing is written), or the result is not right.
    """
    plan = plan_merge(request)
    with atomic_output(plan.output) as tmp_dir:
        report = _write_then_verify(plan, tmp_dir)
        (tmp_dir / RECORD).write_text(json.dumps(merge_record(plan, report), indent=1) + "\n")
        (tmp_dir / CARD).write_text(model_card(request, plan, report))
    return report


def _write_then_verify(plan: MergePlan, tmp_dir: Path) -> MergeReport:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        writing = progress.add_task("merge ", total=plan.bytes_read)
        _copy_files(plan, tmp_dir)
        start = BaseRows(plan.rounding, plan.rounded)
        digests: dict[str, bytes] = {}
        for shard in plan.shards:
            digests |= write_shard(
                tmp_dir / shard.path.name,
                shard,
                plan.dtypes,
                lambda file, name, begin, end, shard=shard: _merged_rows(  # type: ignore[misc]
                    plan, name, begin, start.rows(file, shard, name, begin, end)
                ),
                lambda count: progress.advance(writing, count),
            )
        verifying = progress.add_task("verify", total=plan.bytes_read)
        return verify_merged(plan, tmp_dir, digests, lambda count: progress.advance(verifying, count))


def _merged_rows(plan: MergePlan, name: str, begin: int, rows: Any) -> Any:
    target = plan.targets.get(name)
    return rows if target is None else target.merged(rows, begin)


def _copy_files(plan: MergePlan, tmp_dir: Path) -> None:
    for file in plan.files:
        shutil.copyfile(file, tmp_dir / file.name)
    if plan.template is not None:
        write_template(plan.template, tmp_dir)
    config_file, index_file = tmp_dir / "config.json", plan.base / INDEX_FILE
    config = read_json_object(config_file)
    if _set_dtype(config, plan):
        config_file.write_text(json.dumps(config, indent=2) + "\n")
    if index_file.exists():
        index = read_json_object(index_file)
        total = sum(
            e.bytes_as(plan.dtypes[name]) for shard in plan.shards for name, e in shard.entries.items()
        )
        if (index.get("metadata") or {}).get("total_size", total) == total:
            shutil.copyfile(index_file, tmp_dir / INDEX_FILE)
        else:
            index["metadata"]["total_size"] = total
            (tmp_dir / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _set_dtype(config: dict[str, Any], plan: MergePlan) -> bool:
    """Write the stored type into config.json where it differs from the base's; says whether it did."""
    before = {e.dtype for shard in plan.shards for e in shard.entries.values() if e.dtype in FLOATS}
    after = {
        plan.dtypes[name] for shard in plan.shards for name, e in shard.entries.items() if e.dtype in FLOATS
    }
    if before == after:
        return False
    name = str(SAFETENSORS_DTYPES[after.pop()]).removeprefix("torch.")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = name
    return True


def print_report(report: MergeReport, console: Console) -> None:
    """Print the counts that prove the merge, as a table."""
    table = Table(title=Text(f"merged model: {report.output}"), show_header=False, title_justify="left")
    add_row(table, "adapter", report.form)
    add_row(table, "base", f"{report.base} ({report.base_kind})")
    add_row(
        table,
        "weight files",
        f"{report.files} ({report.bytes_written / 1e9:.2f} GB with the files beside them)",
    )
    add_row(table, "tensors", f"{report.tensors}, names and shapes as in the base")
    saved = f" and {report.saved} saved tensors" if report.saved else ""
    add_row(table, "changed", f"{report.changed} for {report.pairs} lora pairs{saved}")
    if report.base_kind == "dequantized":
        add_row(table, "rounded to 4 bits", f"{report.rounded}")
    if report.converted:
        add_row(table, f"converted to {report.converted_to}", f"{report.converted}")
    add_row(table, "byte-identical", f"{report.unchanged}")
    if report.template is not None:
        add_row(table, "chat template", f"the training's own ({report.template}), not the base's")
    add_row(table, "largest error", f"{report.largest_error:.2e} against the sum in fp64")
    console.print(table)
    console.print(str(report.base_check), markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export.merge",
        description="Merge an adapter into its base model, unquantized.",
        epilog="example: python -m trainer.export.merge runs/embedded --output runs/embedded/merged",
    )
    add_option(parser, "source", place, help="run directory, checkpoint of any form or PEFT adapter folder")
    add_option(parser, "--output", place, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--base",
        choices=get_args(BaseKind),
        default="original",
        help="original: the unquantized weights (default); dequantized: rounded to 4 bits and back, as a 4-bit run "
        "trained on them",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DtypeChoice),
        default="auto",
        help="stored type; auto keeps the base's (default)",
    )
    parser.add_argument(
        "--recipe", help="the training's recipe, for --base dequantized of an adapter outside a run"
    )
    add_adapter_options(parser)
    add_allow(parser)
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        recipe = None if options.recipe is None else find_recipe(options.recipe)
        missing: AdapterOverrides = missing_of(options)
        report = merge(
            MergeRequest(
                options.source,
                options.output,
                options.base,
                options.dtype,
                recipe,
                missing,
                tuple(options.allow),
            )
        )
    except SamestepError as error:
        return print_error(error)
    print_report(report, Console(highlight=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
