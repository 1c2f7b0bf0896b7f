"""In which order workers of pytest-xdist take the files of tests: the longest first, and some of them together.

Files of launches wait for other processes in a third of their time, and all others compute. The longest, many of them
launches, come first and the short ones last: no core is idle meanwhile, and the workers end together.
"""

from __future__ import annotations

from collections.abc import Mapping

from xdist.scheduler import LoadFileScheduling

TOGETHER = {"tests/trainer/test_import_checkpoint.py": "tests/trainer/export/test_consolidate.py"}
"""A file -> the one whose worker takes it too: both need the fixture `foreign`, which takes 20 s of each worker."""

SECONDS = {
    "tests/distributed/test_same_run.py": 95,
    "tests/distributed/test_stops.py": 80,
    "tests/distributed/test_strategies.py": 60,
    "tests/distributed/test_gathered.py": 40,
    "tests/distributed/test_blame.py": 40,
    "tests/trainer/export/test_consolidate.py": 40,
    "tests/distributed/test_survive.py": 38,
    "tests/distributed/test_waits.py": 35,
    "tests/distributed/test_families.py": 32,
    "tests/test_your_data.py": 32,
    "tests/distributed/test_failures.py": 22,
    "tests/trainer/checkpoint/test_resume.py": 26,
    "tests/distributed/test_replay.py": 25,
    "tests/distributed/test_sharded.py": 25,
    "tests/trainer/test_parity.py": 22,
    "tests/distributed/test_recheck.py": 20,
    "tests/distributed/test_own_data.py": 20,
    "tests/trainer/embedded/test_tiny_model.py": 16,
    "tests/trainer/evaluation/test_generate.py": 15,
    "tests/trainer/data/test_loader.py": 10,
    "tests/trainer/loop/test_plain_trl.py": 13,
    "tests/distributed/test_vision_cache.py": 8,
    "tests/launch/hub/test_push.py": 12,
    "tests/trainer/test_prepare.py": 10,
    "tests/trainer/vision_cache/test_runs_with_cache.py": 9,
    "tests/trainer/formats/test_foreign_content.py": 9,
    "tests/trainer/evaluation/test_compare.py": 8,
    "tests/trainer/test_watchdog.py": 8,
    "tests/trainer/evaluation/test_variants.py": 7,
    "tests/launch/test_subprocesses.py": 6,
}
"""Of the longest files, on a quiet machine with two cores. Nothing but the order depends on them."""


class LongestFirst(LoadFileScheduling):  # type: ignore[misc]
    """`--dist loadfile`, where of all files that wait the longest comes first."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return TOGETHER.get(file, file)

    def _assign_work_unit(self, node: object) -> None:
        longest = max(self.workqueue, key=lambda file: seconds_of(file, self.workqueue[file]))
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)


def seconds_of(file: str, tests: Mapping[str, bool]) -> float:
    """As measured, or guessed from the number of its tests."""
    return SECONDS.get(file, 0.05 * len(tests))
