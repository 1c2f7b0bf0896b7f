"""Whether what is evaluated is what was trained: base, processor and the rows asked, held against the run's record."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.inputs.identity import MODEL_PARTS, OWN_TEMPLATE, PARTS
from launch.run.changes import content_changes, is_allowed, refuse_unknown_parts
from launch.run.variants import parse_variant
from trainer.evaluation.request import EvaluationTask
from trainer.export.base_model import old_base_change, recorded_at
from trainer.identity import compute_identity
from trainer.pretrained import base_path

logger = logging.getLogger("trainer")
_OF_ANY_MODEL = ("model.processor", "model.chat_template", "model.tokenizer")
"""Parts of the base that answers of the merged model depend on too."""


def hold_against_training(task: EvaluationTask) -> dict[str, Any]:
    """Return the identity of what is evaluated, as eval.json holds it, and what of it differs as allowed. On rank 0.

    Raises:
        ConfigError: parts differ that are not allowed to; each is named with both digests.
    """
    request = task.request
    all_merged = {parse_variant(model).weights for model in request.models} == {"merged"}
    of_model = _OF_ANY_MODEL if all_merged else MODEL_PARTS
    now = compute_identity(task.recipe, task.index).only(
        *of_model, OWN_TEMPLATE, f"data.{request.split}.rows"
    )
    refuse_unknown_parts(request.allow, PARTS)
    trained_at = request.trained_at
    recorded, where = recorded_at(trained_at) if trained_at else (None, "")
    found = content_changes(recorded, now) if recorded else []
    if trained_at and of_model == MODEL_PARTS:
        old = old_base_change(trained_at, Path(base_path(task.recipe)))
        found += [old] if old else []
    if refused := [change for change in found if not is_allowed(change, request.allow)]:
        raise ConfigError(
            [
                *(f"{change.key}: {change.comparison(f'{where} has')}" for change in refused),
                f"{trained_at}: was trained on others (parts that differ: {len(refused)}); bring them back, or "
                f"--allow {' --allow '.join(change.key for change in refused)}",
            ]
        )
    for change in found:
        logger.warning("allowed: %s", change)
    differing = {change.key: {"run": change.old, "here": change.new} for change in found}
    return {"identity": dict(now.parts), "differs": differing}
