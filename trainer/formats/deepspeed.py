"""DeepSpeed's checkpoints: the parts of every rank put together on one CPU, without DeepSpeed and its process group.

ZeRO keeps each optimizer group as one flat fp32 vector, cut into one piece a rank. Stage 2 cuts the vector of all
parameters; stage 3 cuts every parameter, and each rank's vector is the row of its pieces. The layout is that which
`deepspeed/utils/zero_to_fp32.py` (0.19.8) reads; the moments lie in the same places as the weights.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.errors import CheckpointError
from launch.untrusted_files import LINE, printable, read_bytes
from trainer.formats.key_names import ADAM_STATE_KEYS
from trainer.formats.torch_files import as_number, load_mapping, load_torch, mapping
from trainer.formats.validated import inside, whole_number

_MOST_SHOWN = 64
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)")


@dataclass(frozen=True)
class ZeroState:
    """What DeepSpeed trained, by parameter name; `optimizer_state` has `<name>.exp_avg`, `.exp_avg_sq`, `.step`."""

    form: str
    weights: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    step: int | None


def zero_folder(source: Path) -> Path | None:
    """Return the folder with every rank's files: `source`, or the one its file `latest` names; None without one."""
    if _optimizer_files(source):
        return source
    latest = source / "latest"
    if latest.is_file():
        named = _named_in(latest)
        if named and named.is_dir():
            return named
        if universal_folder(source) is None:
            what = f"names {named}, which is missing" if named else "is empty and names no folder"
            raise CheckpointError(printable(f"{latest}: {what}; copy the checkpoint again"))
        return None
    steps = [folder for folder in source.glob("global_step*") if _optimizer_files(folder)]
    return steps[0] if len(steps) == 1 else None


def universal_folder(source: Path) -> Path | None:
    """Return the folder of a universal checkpoint: `source`, or the one in it; None without one."""
    latest = source / "latest_universal"
    named = _named_in(latest) if latest.is_file() else None
    candidates = [source, *([named] if named else [])]
    candidates += sorted(source.glob("*universal*"))
    for folder in candidates:
        if (folder / "zero").is_dir() and any(folder.glob("*_model_states.pt")):
            return folder
    return None


def _named_in(latest: Path) -> Path | None:
    """Return the folder that DeepSpeed's `latest` names; None when empty. CheckpointError: it is not beside it."""
    name = read_bytes(latest, LINE).decode(errors="replace").strip()
    return inside(latest.parent, name, latest) if name else None


def read_zero(folder: Path) -> ZeroState:
    """Read weights and optimizer state of a ZeRO-1, 2 or 3 folder.

    Raises:
        CheckpointError: files of some ranks are missing (all are named), or tensor parallelism wrote it.
    """
    files = _optimizer_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: holds no *_optim_states.pt of a rank; copy the checkpoint again")
    first = _optimizer_state(files[min(files)])
    stage, ranks = _stage_and_ranks(first, files[min(files)])
    if gone := ranks - sum(rank < ranks for rank in files):
        shown = itertools.islice((rank for rank in range(ranks) if rank not in files), _MOST_SHOWN)
        names = [*(_named_like(files[min(files)], rank) for rank in shown), *["..."] * (gone > _MOST_SHOWN)]
        raise CheckpointError(
            f"{folder}: {gone} of {ranks} ranks' files are missing ({', '.join(names)}); "
            "copy the checkpoint again, from every node"
        )
    shapes, step = _shapes(folder)
    parts = [_optimizer_state(files[rank]) for rank in range(ranks)]
    flat = {"": [_flat_weights(part, stage, files[rank]) for rank, part in enumerate(parts)]}
    if stage != 3 and any(len(vectors) != len(shapes) for vectors in flat[""]):
        raise CheckpointError(
            f"{folder}: holds {len(flat[''][0])} groups of weights where {len(shapes)} are named; copy it again"
        )
    flat |= {
        key: states
        for key in ADAM_STATE_KEYS
        if (states := _flat_states(parts, stage, key, flat[""])) is not None
    }
    take = _whole_of_stage_3 if stage == 3 else _whole_of_stage_2
    paddings = first.get("param_alignment_paddings")
    try:
        whole = {key: dict(take(folder, shapes, vectors, paddings)) for key, vectors in flat.items()}
    except (RuntimeError, LookupError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{folder}: its shapes and its vectors are not of one checkpoint ({type(error).__name__}: "
            f"{printable(str(error))[:200]}); copy it again"
        ) from error
    counted = _step_count(parts[0], stage)
    updates = step if counted is None else counted
    optimizer_state: dict[str, Tensor] = {}
    if updates is not None and all(key in whole for key in ADAM_STATE_KEYS):
        for name in whole[""]:
            optimizer_state |= {f"{name}.{key}": whole[key][name] for key in ADAM_STATE_KEYS}
            optimizer_state[f"{name}.step"] = torch.tensor(float(updates))
    return ZeroState(f"DeepSpeed ZeRO-{int(stage)} of {ranks} ranks", whole[""], optimizer_state, step)


def read_universal(folder: Path) -> ZeroState:
    """Read weights and optimizer state of a universal checkpoint: a folder a parameter, a file a state.

    Raises:
        CheckpointError: files of some parameters are missing (all are named).
    """
    shapes, step = _shapes(folder)
    sizes = {name: size for group in shapes for name, size in group.items()}
    places = {name: inside(folder / "zero", name, folder) for name in sizes}
    needed = [f"zero/{name}/{key}.pt" for name in sizes for key in ("fp32", *ADAM_STATE_KEYS)]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(needed)} files are missing ({printable(', '.join(missing[:5]))}); "
            "copy the checkpoint again"
        )
    count = _universal_step(folder)
    weights: dict[str, Tensor] = {}
    optimizer_state: dict[str, Tensor] = {}
    for name, size in sizes.items():
        here = places[name]
        weights[name] = _universal_tensor(here / "fp32.pt", size)
        own = here / "step.pt"
        steps = as_number(load_torch(own)) if own.is_file() else count if count is not None else step
        if steps is not None:
            optimizer_state |= {
                f"{name}.{key}": _universal_tensor(here / f"{key}.pt", size) for key in ADAM_STATE_KEYS
            }
            optimizer_state[f"{name}.step"] = torch.tensor(float(steps))
    return ZeroState("DeepSpeed universal checkpoint", weights, optimizer_state, step)


def _optimizer_files(folder: Path) -> dict[int, Path]:
    """Return every rank's optimizer file by rank."""
    files_by_rank = {}
    for file in folder.glob("*_optim_states.pt"):
        match = _RANK.search(file.name)
        if match is None:
            continue
        if int(match[2]):
            raise CheckpointError(f"{file}: was written under tensor parallelism, which is not read here")
        files_by_rank[int(match[1])] = file
    return files_by_rank


def _optimizer_state(file: Path) -> dict[str, Any]:
    key = "optimizer_state_dict"
    return mapping(load_mapping(file).get(key), file, key)


def _stage_and_ranks(state: dict[str, Any], file: Path) -> tuple[int, int]:
    stage, count = state.get("zero_stage"), state.get("partition_count")
    counts = count if isinstance(count, list) and count else [count]
    if not isinstance(stage, int) or not all(isinstance(each, int) and each > 0 for each in counts):
        raise CheckpointError(f"{file}: is of no ZeRO stage; give a checkpoint of ZeRO-1, 2 or 3")
    return stage, max(counts)


def _named_like(file: Path, rank: int) -> str:
    return _RANK.sub(lambda match: f"zero_pp_rank_{rank}_mp_rank_{match[2]}", file.name)


def _shapes(folder: Path) -> tuple[list[dict[str, tuple[int, ...]]], int | None]:
    """Shapes of the trained parameters in the order of the flat vectors, by group; and the step."""
    files = sorted(folder.glob("*_model_states.pt"), key=lambda file: (len(file.name), file.name))
    if not files:
        raise CheckpointError(
            f"{folder}: has no *_model_states.pt, which says what the shards hold; copy the checkpoint again"
        )
    state = load_mapping(files[0])
    groups, step = state.get("param_shapes"), state.get("global_steps")
    if not isinstance(groups, list) or not groups:
        raise CheckpointError(f"{files[0]}: names no trained parameters; take another checkpoint")
    shapes = [mapping(group, files[0], "param_shapes") for group in groups]
    sizes = [each for group in shapes for each in group.items()]
    if not all(isinstance(name, str) and _is_size(size) for name, size in sizes):
        raise CheckpointError(f"{files[0]}: param_shapes holds no shapes by name; copy the checkpoint again")
    return shapes, None if step is None else whole_number(step, files[0], "global_steps")


def _is_size(size: object) -> bool:
    return isinstance(size, tuple) and all(type(length) is int and length >= 0 for length in size)


def _flat_weights(part: dict[str, Any], stage: int, file: Path) -> list[Tensor]:
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    groups = part.get(key)
    if not isinstance(groups, list) or not all(isinstance(group, Tensor) for group in groups):
        raise CheckpointError(f"{file}: {key} is no list of tensors; copy the checkpoint again")
    return [group.detach() for group in groups]


def _base_state(part: dict[str, Any], stage: int) -> dict[Any, dict[str, Any]]:
    """Return the optimizer's own state by parameter group; empty where there is none to read."""
    base = part.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    state = base.get("state") if isinstance(base, dict) else None
    return {n: own for n, own in state.items() if isinstance(own, dict)} if isinstance(state, dict) else {}


def _flat_states(
    parts: Sequence[dict[str, Any]], stage: int, key: str, weights: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]] | None:
    """Return the vectors of one optimizer state of every rank; None where the optimizer has none of the weights' sizes.

    The last rank's may be longer: its weights are saved without the padding of the group, its moments with it.
    """
    states: list[list[Tensor]] = []
    for part, flat in zip(parts, weights, strict=True):
        state = _base_state(part, stage)
        vectors = [state.get(number, {}).get(key) for number in range(len(flat))]
        is_last = part is parts[-1]
        for vector, weight in zip(vectors, flat, strict=True):
            if not isinstance(vector, Tensor) or (vector.shape != weight.shape and not is_last):
                return None
        states.append([vector for vector in vectors if vector is not None])
    return states


def _step_count(part: dict[str, Any], stage: int) -> float | None:
    return as_number(_base_state(part, stage).get(0, {}).get("step"))


def _whole_of_stage_2(
    folder: Path,
    shapes: Sequence[dict[str, tuple[int, ...]]],
    vectors: Sequence[Sequence[Tensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[str, Tensor]]:
    for number, group in enumerate(shapes):
        vector = torch.cat([of_rank[number] for of_rank in vectors])
        begin = 0
        for position, (name, size) in enumerate(group.items()):
            yield name, _piece(folder, vector, begin, math.prod(size), name).view(size).clone()
            begin += math.prod(size) + (paddings[number][position] if paddings else 0)


def _whole_of_stage_3(
    folder: Path,
    shapes: Sequence[dict[str, tuple[int, ...]]],
    vectors: Sequence[Sequence[Tensor]],
    paddings: Sequence[Sequence[int]] | None,
) -> Iterator[tuple[str, Tensor]]:
    # Sub-groups follow each other, pieces may span two.
    rows = [torch.cat(list(of_rank)) for of_rank in vectors]
    begin = 0
    for name, size in ((name, size) for group in shapes for name, size in group.items()):
        share = math.ceil(math.prod(size) / len(rows))
        pieces = torch.cat([_piece(folder, row, begin, share, name) for row in rows])
        yield name, pieces[: math.prod(size)].view(size).clone()
        begin += share


def _piece(folder: Path, vector: Tensor, begin: int, count: int, name: str) -> Tensor:
    if begin + count > len(vector):
        raise CheckpointError(
            f"{folder}: the shards end inside {printable(name)} ({len(vector)} numbers, {begin + count} needed); "
            "they are not of one checkpoint, copy it again"
        )
    return vector[begin : begin + count]


def _universal_tensor(file: Path, size: tuple[int, ...]) -> Tensor:
    """Stage 2 gives a shaped tensor in a dictionary, stage 3 a flat one (DeepSpeed 0.19.8)."""
    stored = load_torch(file)
    tensor = stored.get("param") if isinstance(stored, dict) else stored
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{file}: holds no tensor; convert it again")
    if tensor.numel() != math.prod(size):
        raise CheckpointError(
            f"{file}: holds {tensor.numel()} numbers where {list(size)} are needed; convert it again"
        )
    return tensor.detach().view(size).clone()


def _universal_step(folder: Path) -> float | None:
    file = folder / "zero" / "optimizer_state.pt"
    if not file.is_file():
        return None
    return _step_count(load_mapping(file), 3)  # in the same places as ZeRO-3's
