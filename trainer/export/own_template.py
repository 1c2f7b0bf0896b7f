"""The chat template of the user's own that a run trained with: whoever loads its merged model gets it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launch.errors import CheckpointError, ConfigError
from launch.inputs.file_digests import files_digest
from launch.inputs.identity import OWN_TEMPLATE
from launch.recipe.schema import Recipe
from launch.untrusted_files import DOCUMENT, UNREADABLE, printable, read_mapping, read_text
from trainer.export.adapter import Adapter
from trainer.export.base_model import recorded_at, run_containing

TEMPLATE_FILE = "chat_template.jinja"
_OTHER_PLACES = ("chat_template.json", "tokenizer_config.json", "processor_config.json")


@dataclass(frozen=True)
class OwnTemplate:
    """`text`: of the template; `source`: the file it was read from."""

    text: str
    source: Path


def own_template(adapter: Adapter, recipe: Recipe | None) -> OwnTemplate | None:
    """The template of `data.chat_template`, as the run had it; None where the recipe has none, or is not known.

    Read from the file that the recipe names where it is still the training's, else from the adapter of the run, which
    keeps it.

    Raises:
        CheckpointError: neither is there.
    """
    if recipe is None or recipe.data.chat_template is None:
        return None
    file, run = Path(recipe.data.chat_template), run_containing(adapter.path)
    recorded, where = recorded_at(adapter.path)
    wanted = recorded.parts.get(OWN_TEMPLATE) if recorded is not None else None
    kept = run.adapter / TEMPLATE_FILE if run is not None else None
    is_kept = kept is not None and kept.is_file()
    try:
        if files_digest([file]) == wanted or (wanted is None and not is_kept):
            return OwnTemplate(read_text(file), file)
        why = f"has changed since {where}"
    except (*UNREADABLE, ConfigError):
        why = "cannot be read"
    if kept is not None and is_kept:
        return OwnTemplate(read_text(kept), kept)
    raise CheckpointError(
        f"data.chat_template: {printable(str(file))} {why}, and the run's adapter, which keeps it, is not written yet; "
        "put the file back as it was"
    )


def write_template(template: OwnTemplate, folder: Path) -> None:
    """Make it the one template of a model's folder: the base's own would win for who reads another file."""
    (folder / TEMPLATE_FILE).write_text(template.text, encoding="utf-8")
    for name in _OTHER_PLACES:
        file = folder / name
        if not file.is_file():
            continue
        values = read_mapping(file, DOCUMENT)
        if values.pop("chat_template", None) is None:
            continue
        if values:
            file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            file.unlink()
