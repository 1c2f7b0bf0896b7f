"""The errors a user sees: one base class, one exit status each, no traceback."""

from collections.abc import Sequence


class SamestepError(Exception):
    """What went wrong, in words a user can act on.

    `exit_status`: 2 for a refused request, 1 for a failed run. `agreed`: every rank raises this error at the same
    point, so that one of them says it and all end in good order.
    """

    exit_status = 1
    agreed = False


class ConfigError(SamestepError):
    """A refused request. Holds every problem found, not only the first."""

    exit_status = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class InUseError(ConfigError):
    """Somebody else trains the run now."""


class UnansweredError(ConfigError):
    """A scheduler gave no answer: the job may be queued all the same."""


class NoSpaceError(ConfigError):
    """The disk has no room for a run now."""


class CheckpointError(SamestepError):
    """A checkpoint, adapter or merge that cannot be used as asked."""

    exit_status = 2


class RunError(SamestepError):
    """A run that started and could not go on."""


class GpuMemoryError(RunError):
    """The GPU's memory did not suffice: smaller settings may."""
