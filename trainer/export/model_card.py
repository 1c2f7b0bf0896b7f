"""README.md of an adapter and of a merged model, and merge.json: where it comes from, its scores, how it is loaded."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.atomic_files import atomic_write
from launch.checkpoints.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS, digest_of, read_digest
from launch.hub_names import EMBEDDED, is_hub_id
from launch.recipe.schema import Recipe
from launch.run.directory import RunDirectory
from launch.run.merged_model import DIGEST, is_of_another_adapter, read_record
from launch.run.proof import proof_of, proof_table
from launch.untrusted_files import TABLE, UNREADABLE, parse_json, read_json, read_text
from trainer.export.base_model import run_containing, run_recipe
from trainer.export.merge_plan import CARD, MergePlan, MergeRequest
from trainer.export.verify import MergeReport

logger = logging.getLogger("trainer")
_FIGURES_BEGIN, _FIGURES_END = (
    "<!-- figures, written anew by `samestep evaluate` -->",
    "<!-- end of the figures -->",
)


def model_card(request: MergeRequest, plan: MergePlan, report: MergeReport) -> str:
    """Return the text of README.md, with the front matter that the hub reads."""
    recipe, run = run_recipe(request.source, request.recipe), run_containing(request.source)
    base = _base_name(recipe, plan)
    name = recipe.name if recipe else plan.output.name
    parts = [
        _front_matter(base, recipe),
        f"# {name}, merged\n",
        _what(base, plan, report),
        _training(recipe, plan),
        figures_of(run, digest_of(plan.adapter.contents), merge_record(plan, report)),
        _loading(),
        _loading_the_adapter(recipe, base, _adapter_beside(plan)),
    ]
    return "\n".join(part for part in parts if part)


def adapter_card(run: RunDirectory, recipe: Recipe, base: str, folder: Path) -> str:
    """Return the text of README.md of a run's own adapter, which lies in `folder`. `base`: as the adapter names it."""
    lora = recipe.lora
    what = (
        f"A LoRA adapter (r {lora.r}, alpha {lora.lora_alpha}) for {base}, with the processor of its base.\n"
    )
    parts = [
        _front_matter(base, recipe, "peft", "adapter"),
        f"# {recipe.name}, adapter\n",
        what,
        _training_of(recipe),
        figures_of(run, read_digest(folder)),
        "## How to load it\n\nIn this folder:\n",
        _loading_the_adapter(recipe, base, "."),
    ]
    return "\n".join(part for part in parts if part)


def refresh_figures(run: RunDirectory) -> None:
    """Write the figures that the run has now into the cards that this module wrote for its adapter."""
    for folder in (run.adapter, run.merged, run.merged_dequantized):
        card = folder / CARD
        if folder != run.adapter and is_of_another_adapter(run, folder):
            continue
        try:
            text = read_text(card)
        except UNREADABLE:
            continue
        before, begin, rest = text.partition(_FIGURES_BEGIN)
        _, end, after = rest.partition(_FIGURES_END)
        if begin and end:
            try:
                merge = None if folder == run.adapter else read_record(folder)
                figures = figures_of(run, read_digest(run.adapter), merge)
                atomic_write(card, before + figures.rstrip("\n") + after)
            except OSError as error:  # another user's; the answers are written
                logger.warning("%s: keeps its older figures (%s)", card, error.strerror or error)


def merge_record(plan: MergePlan, report: MergeReport) -> dict[str, Any]:
    """Return what programs want to know of a merge: `merge.json`."""
    return {
        "base": plan.base_kind,
        "rounding": None if plan.rounding is None else str(plan.rounding),
        "base_model": str(plan.adapter.base or plan.base),
        "base_compared": report.base_check.compared,
        "base_comparison": str(report.base_check),
        "adapter": str(plan.adapter.path),
        DIGEST: digest_of(plan.adapter.contents),
        "form": plan.adapter.form,
        "dtypes": sorted(set(plan.dtypes.values())),
        "tensors": report.tensors,
        "changed": report.changed,
        "rounded": report.rounded,
        "converted": report.converted,
        "converted_to": report.converted_to,
        "byte_identical": report.unchanged,
        "largest_error": report.largest_error,
    }


def _base_name(recipe: Recipe | None, plan: MergePlan) -> str:
    named = recipe.model.name_or_path if recipe else plan.adapter.base
    return str(named or plan.base)


def _front_matter(
    base: str, recipe: Recipe | None, library: str = "transformers", relation: str = "finetune"
) -> str:
    lines = ["---", f"library_name: {library}", "pipeline_tag: image-text-to-text"]
    if is_hub_id(base):
        lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
    if recipe and is_hub_id(recipe.data.dataset):
        lines += ["datasets:", f"- {recipe.data.dataset}"]
    return "\n".join([*lines, "---", ""])


def _what(base: str, plan: MergePlan, report: MergeReport) -> str:
    adapter = plan.adapter.config
    kind = "DoRA" if adapter.get("use_dora") else "rsLoRA" if adapter.get("use_rslora") else "LoRA"
    start = (
        "the original, unquantized weights"
        if plan.rounding is None
        else f"the weights as the training saw them ({plan.rounding}, and back)"
    )
    saved = f" and {report.saved} tensors trained whole" if report.saved else ""
    converted = f"{report.converted} only converted to {report.converted_to}, " if report.converted else ""
    return (
        f"{base} with a {kind} adapter (r {adapter['r']}, alpha {adapter['lora_alpha']}) merged into {start}: "
        f"{report.pairs} lora pairs{saved}. Of {report.tensors} tensors {report.changed} were changed, "
        f"{report.rounded} rounded only, {converted}{report.unchanged} are byte-identical to the base.\n\n"
        f"The {report.base_check}.\n"
    )


def _training(recipe: Recipe | None, plan: MergePlan) -> str:
    if recipe is None:
        return f"## Training\n\nThe adapter came as: {plan.adapter.form}. Nothing else is known of its training.\n"
    return _training_of(recipe)


def _training_of(recipe: Recipe) -> str:
    data, training = recipe.data, recipe.training
    dataset = "mini ChartQA drawn from plotly's tables" if data.dataset == EMBEDDED else data.dataset
    steps = (
        f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    )
    quantized = recipe.quantization.bnb_4bit_quant_type if recipe.quantization.load_in_4bit else "none"
    rows = {
        "data": f"{dataset}, split `{data.train}`",
        "loss on": f"the {data.loss}",
        "steps": f"{steps} of {recipe.batch.global_batch_size} samples",
        "learning rate": f"{training.learning_rate:g}",
        "quantization of the base while training": quantized,
        "revision of the base": recipe.model.revision,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"## Training\n\n| | |\n|---|---|\n{table}\n\nSystem message: {json.dumps(data.system_message)}\n"


def figures_of(run: RunDirectory | None, adapter: str | None, merge: Mapping[str, Any] | None = None) -> str:
    """Of metrics.jsonl and eval.json, as far as they are there; what is damaged, or of other weights, is left out.

    `adapter`: the digest of the card's adapter; a run that went on has the answers of its older one. `merge`:
    merge.json of a merged model. What the run proves of itself follows (`launch.run.proof`).
    """
    if run is None:
        return ""
    lines = [_FIGURES_BEGIN]
    try:
        if steps := [record for record in _records(run.metrics_file) if "loss" in record]:
            lines.append(f"Training loss {steps[0]['loss']:.3f} at step {steps[0]['step']}, "
                         f"{steps[-1]['loss']:.3f} at step {steps[-1]['step']}.")  # fmt: skip
    except (ValueError, LookupError, TypeError):
        pass  # lines that no trainer writes
    try:
        result = read_json(run.eval_file(), TABLE)
        overall = {
            model: groups["overall"]
            for model, groups in result["accuracy"].items()
            if model == "base"
            or None in (weights := result.get("weights", {}).get(model), adapter)
            or weights == adapter
        }
        rows = [
            f"| {model} | {each['percent']:.1f} % | {each['correct']} of {each['count']} |"
            for model, each in overall.items()
            if each["percent"] is not None
        ]
        if rows:
            lines.append(
                f"\nRelaxed accuracy on {result['questions']} questions of the {result['split']} split:\n"
            )
            lines += ["| model | accuracy | correct |", "|---|---|---|", *rows]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # not evaluated yet
    if len(lines) > 1:
        lines.insert(1, "## Figures\n")
    if table := proof_table(proof_of(run, adapter, merge)):
        lines += ["", table, ""]
    return "\n".join([*lines, _FIGURES_END]) + "\n"


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        return [parse_json(line) for line in read_text(file, TABLE).splitlines() if line]
    except (OSError, ValueError):
        return []


def _loading() -> str:
    return """## How to load it

In this folder, with transformers:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(".", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(".")
```

With vLLM: `vllm serve .`
"""


def _adapter_beside(plan: MergePlan) -> str | None:
    """Return where the adapter's folder lies, seen from the merged model's; None where it came in another form."""
    run = run_containing(plan.adapter.path)
    folder = run.adapter if run is not None and plan.adapter.path == run.path else plan.adapter.path
    if not all((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)):
        return None
    return os.path.relpath(folder, plan.output)


def _loading_the_adapter(recipe: Recipe | None, base: str, folder: str | None) -> str:
    """Write the code that adds the adapter in `folder` to its base with PEFT. The processor lies beside the card."""
    if folder is None:
        return ""
    before, name = "", f'"{base}"'
    if recipe is not None and recipe.model.name_or_path == EMBEDDED:
        before = "from launch.inputs.caches import embedded_folder  # `samestep prepare embedded` builds it\n"
        name = 'embedded_folder() / "model"'
    elif recipe is not None and recipe.model.revision != "main" and is_hub_id(base):
        name += f', revision="{recipe.model.revision}"'
    return f"""The adapter on its base, with PEFT:

```python
{before}from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
base = AutoModelForImageTextToText.from_pretrained({name}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, "{folder}")
processor = AutoProcessor.from_pretrained(".")
```
"""
