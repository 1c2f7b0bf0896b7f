"""Whether what is evaluated is what was trained: base, processor and the rows asked, held against the run's record."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.inputs.identity import MODEL_PARTS, PARTS
from launch.run.changes import content_changes, is_allowed, refuse_unknown_parts
from trainer.evaluation.answers import Task
from trainer.export.base_model import old_base_change, recorded_at
from trainer.identity import compute_identity
from trainer.pretrained import base_path

logger = logging.getLogger("trainer")
_OF_ANY_MODEL = ("model.processor", "model.chat_template", "model.tokenizer")
"""Parts of the base that answers of the merged model depend on too."""


def hold_against_training(task: Task) -> dict[str, Any]:
    """The identity of what is evaluated, as eval.json holds it, and what of it differs as allowed. On rank 0.

    Raises:
        ConfigError: parts differ that are not allowed to; each is named with both digests.
    """
    request = task.request
    of_model = _OF_ANY_MODEL if request.models == ("merged",) else MODEL_PARTS
    now = compute_identity(task.recipe, task.index).only(*of_model, f"data.{request.split}.rows")
    refuse_unknown_parts(request.allow, PARTS)
    recorded, where = recorded_at(request.run.path)
    found = content_changes(recorded, now) if recorded else []
    if of_model == MODEL_PARTS and (old := old_base_change(request.run.path, Path(base_path(task.recipe)))):
        found.append(old)
    if refused := [change for change in found if not is_allowed(change, request.allow)]:
        raise ConfigError(
            [
                *(f"{change.key}: {change.comparison(f'{where} has')}" for change in refused),
                f"{request.run.path}: was trained on others (parts that differ: {len(refused)}); bring them back, or "
                f"--allow {' --allow '.join(change.key for change in refused)}",
            ]
        )
    for change in found:
        logger.warning("allowed: %s", change)
    differing = {change.key: {"run": change.old, "here": change.new} for change in found}
    return {"identity": dict(now.parts), "differs": differing}
