"""Scoring answers while a run trains: equal shares of batches, when it is due, and what a full GPU is told."""

from __future__ import annotations

import pytest
import torch

from launch.errors import RunError
from launch.recipe.loading import find_recipe, load_recipe
from trainer.evaluation.during_training import _answers, answers_are_due, shares


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_every_rank_has_as_many_batches_and_each_counts_once(world_size: int) -> None:
    batches = [[0, 3], [1, 4], [2, 5], [6]]
    ranks = [shares(batches, rank, world_size) for rank in range(world_size)]
    assert len({len(mine) for mine in ranks}) == 1
    counted = sorted(position for mine in ranks for batch, counts in mine if counts for position in batch)
    assert counted == list(range(7))
    assert all(batch for mine in ranks for batch, _ in mine)  # nobody generates from nothing


def test_every_n_th_evaluation_scores_answers_and_the_last_one() -> None:
    settings = ["evaluation.every_steps=10", "evaluation.answers=8", "evaluation.answers_every=3"]
    recipe = load_recipe(find_recipe("embedded"), settings)
    due = [step for step in (*range(10, 101, 10), 105) if answers_are_due(recipe, step, 105)]
    assert due == [30, 60, 90, 105]
    assert not answers_are_due(load_recipe(find_recipe("embedded")), 105, 105)


def test_a_full_gpu_is_told_which_key_to_lower() -> None:
    class Full:
        def answers(self, *_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunError, match=r"evaluation.batch_size: 2 prompts are too many beside the training"):
        _answers(Full(), ["a", "b"], [0, 1])  # type: ignore[arg-type]
