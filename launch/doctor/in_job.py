"""`python -m launch.doctor.in_job FOLDER`: what the nodes of a job have said before it trains.

Called by slurm/train.sbatch on the first node. The table goes to standard error, the job's log. Standard output belongs
to that script: `NODES REASON` of the nodes that are not fit, `* REASON` where no others would be, or nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.atomic_files import atomic_write
from launch.console import log_stderr, table_console
from launch.doctor.finding import to_json, verdict
from launch.doctor.reports import failures_of_all, findings_of_nodes, print_nodes, short_reason, unfit_nodes
from launch.slurm.output import expand_nodes
from launch.untrusted_files import TABLE, printable, read_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.doctor.in_job", description=__doc__)
    parser.add_argument("folder", type=Path, help="with the doctor.txt of this attempt")
    parser.add_argument("--node-list", required=True, help="as Slurm writes it")
    options = parser.parse_args(arguments)
    names = expand_nodes(options.node_list)
    try:
        printed = read_bytes(options.folder / "doctor.txt", TABLE).decode(errors="replace")
    except (OSError, ValueError) as error:
        log_stderr(f"doctor: nothing is known of the nodes ({error}); the run trains all the same")
        return 1
    findings = findings_of_nodes(printed, names)
    file = options.folder / "doctor.json"
    try:
        atomic_write(file, to_json(findings) + "\n")
    except OSError as error:  # a full disk must not keep what was found from deciding
        log_stderr(f"{file}: cannot be written ({error.strerror}); the table follows")
    print_nodes(table_console(to_stderr=True), findings, names)
    log_stderr(f"doctor: {verdict(findings)}")
    if of_all := failures_of_all(findings, len(names)):
        print(printable(f"* {short_reason(of_all)}"))
    elif unfit := unfit_nodes(findings):
        print(printable(f"{','.join(unfit)} {short_reason(findings)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
