"""What the programs of the trainer's side import before they begin: each costs seconds of every start."""

import subprocess
import sys

NEVER = {
    *("deepspeed", "sklearn", "scipy", "matplotlib", "plotly", "gradio", "trackio", "tensorboard", "IPython"),
    *("liger_kernel", "torch._inductor.compile_fx", "torch.distributed.run", "torch.utils.tensorboard"),
}
OF_ROWS = {"datasets", "pandas", "pyarrow"}
OF_TRAINING = {"trl", "transformers.trainer", "wandb"}
PROGRAMS = {
    "trainer.evaluation.ask": NEVER | OF_ROWS | OF_TRAINING,
    "trainer.export.merge": NEVER | OF_ROWS | OF_TRAINING,
    "trainer.evaluation.generate": NEVER | OF_TRAINING,
    "trainer.train": NEVER,
}


def test_a_program_imports_what_it_needs_and_the_collector_waits_for_that() -> None:
    """One after another in one process, which begins with those that need least."""
    program = (
        "import importlib, sys, gc\n"
        "collections = []\n"
        "gc.callbacks.append(lambda phase, info: phase == 'start' and collections.append(1))\n"
        f"for name, not_needed in {PROGRAMS!r}.items():\n"
        "    importlib.import_module(name)\n"
        "    print(name, len(collections), *sorted(not_needed & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(name, more) for name, _, *more in lines] == [(name, []) for name in PROGRAMS]
    # With Python's own thresholds 1,500; some, before the package says so.
    assert int(lines[-1][1]) < 100


def test_after_the_imports_the_collector_works_as_before_and_leaves_them_out() -> None:
    program = (
        "import gc; own = gc.get_threshold()\n"
        "from trainer.garbage import IMPORTED_OBJECTS, resume_collection\n"
        "assert gc.get_threshold()[0] == IMPORTED_OBJECTS\n"
        "resume_collection(); frozen = gc.get_freeze_count()\n"
        "resume_collection()\n"
        "print(gc.get_threshold() == own, frozen > 1000, gc.get_freeze_count() == frozen)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]
