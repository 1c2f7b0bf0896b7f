"""What a replay leaves out of the run that it takes again."""

from __future__ import annotations

from launch.audit.restored import QUIET
from launch.recipe.fingerprint import altering_values
from tests.helpers.indexes import embedded_recipe


def test_a_replay_uploads_and_tracks_nothing_and_alters_no_number() -> None:
    shown = (
        "hub.push=true",
        "hub.repo_id=me/it",
        "hub.every_checkpoints=1",
        "tracking.report_to=[trackio, wandb]",
    )
    recipe, quiet = embedded_recipe(*shown), embedded_recipe(*shown, *QUIET)
    assert (recipe.hub.push, recipe.tracking.trackers) == (True, ("trackio", "wandb"))
    assert (quiet.hub.push, quiet.tracking.trackers) == (False, ())
    assert altering_values(quiet) == altering_values(recipe)
