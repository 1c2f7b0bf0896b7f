"""What `training.lr_scheduler_kwargs` may hold for each schedule. Torch-free.

transformers refuses the rest with a traceback when the training begins, or passes over it (its constant schedules).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_SHAPES = ("linear", "cosine", "1-sqrt")
Kind = type[int] | type[float] | tuple[str, ...]

ARGUMENTS: Mapping[str, Mapping[str, Kind]] = {
    "linear": {},
    "cosine": {"num_cycles": float},
    "cosine_with_restarts": {"num_cycles": int},
    "cosine_with_min_lr": {"num_cycles": float, "min_lr": float, "min_lr_rate": float},
    "polynomial": {"lr_end": float, "power": float},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": int},
    "warmup_stable_decay": {
        "num_decay_steps": int,
        "num_stable_steps": int,
        "warmup_type": _SHAPES,
        "decay_type": _SHAPES,
        "min_lr_ratio": float,
        "num_cycles": float,
    },
}
"""The arguments of each schedule in transformers 5.23 (`transformers.optimization`), as the values of their kind."""
_KEY = "training.lr_scheduler_kwargs"


def wrong_schedule(schedule: str, given: Mapping[str, object] | None, learning_rate: float) -> Iterator[str]:
    """Every problem of a schedule's arguments."""
    values, known = dict(given or {}), ARGUMENTS[schedule]
    takes = ", ".join(known) or "none"
    for name, value in values.items():
        if name not in known:
            yield f"{_KEY}.{name}: {schedule} has no such argument; it takes {takes}"
        elif wrong := _wrong_value(value, known[name]):
            yield f"{_KEY}.{name}: {value!a} is not {wrong}; give one"
    if schedule == "cosine_with_min_lr" and ("min_lr" in values) + ("min_lr_rate" in values) != 1:
        yield f"{_KEY}: {schedule} needs either min_lr (a rate) or min_lr_rate (a share of the rate); give one of them"
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in values:
        yield f"{_KEY}: {schedule} needs num_decay_steps; give the steps over which the rate decays"
    end = values.get("lr_end", 1e-7)
    if schedule == "polynomial" and isinstance(end, int | float) and end >= learning_rate:
        yield f"{_KEY}.lr_end: {end} is not below training.learning_rate ({learning_rate}); lower it"


def _wrong_value(value: object, kind: Kind) -> str | None:
    if isinstance(kind, tuple):
        return None if value in kind else " or ".join(kind)
    if kind is int:
        return None if isinstance(value, int) and value >= 1 else "a whole number of at least 1"
    return None if isinstance(value, int | float) and value >= 0 else "a number of at least 0"
