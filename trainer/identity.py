"""What a run is made of, as its processes find it: looked at once a node, the same on all of them."""

from __future__ import annotations

import os
from pathlib import Path

from launch.errors import RunError
from launch.inputs.dataset_index import Index
from launch.inputs.identity import RunIdentity, short, whole_identity
from launch.recipe.schema import Recipe
from trainer.distributed.collectives import gather_objects, run_on_all_ranks, run_on_main
from trainer.pretrained import base_path


def compute_identity(recipe: Recipe, index: Index) -> RunIdentity:
    """Of a recipe whose base and data are here. Large files are read once in a cache's lifetime. ConfigError."""
    return whole_identity(Path(base_path(recipe)), recipe, index)


def is_first_of_node() -> bool:
    """Of the processes that the launcher started on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def agree_on_identity(recipe: Recipe, index: Index) -> RunIdentity:
    """Return the identity of the run, found by the first process of every node. A collective.

    Raises:
        ConfigError: a base cannot be read.
        RunError: the nodes have different ones.
    """
    own = run_on_all_ranks(lambda: compute_identity(recipe, index) if is_first_of_node() else None)
    identities = gather_objects(own)
    first = identities[0]
    assert first is not None  # rank 0 is the first of its node

    def compare() -> None:
        for rank, other in enumerate(identities):
            odd = [
                part
                for part in first.parts
                if other is not None and other.parts.get(part) != first.parts[part]
            ]
            if other is not None and odd:
                raise RunError(
                    f"{odd[0]}: is another on the node of rank {rank} ({short(other.parts.get(odd[0], ''))}, "
                    f"{short(first.parts[odd[0]])} on rank 0's; parts that differ: {len(odd)}); share HF_HOME and "
                    "SAMESTEP_CACHE between the nodes, or make their models and data alike"
                )

    run_on_main(compare)
    return first
