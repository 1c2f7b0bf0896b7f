"""Started by `accelerate launch`: does several runs one after another in one process group.

Starting processes costs ten times what these runs do, so one launch does as many as it can. What runs is
`trainer.train` itself; only the process start is shared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trainer import train
from trainer.speech import speak_plainly


def main() -> None:
    """Arguments: a JSON file with a list of argument lists of `trainer.train`."""
    speak_plainly()
    requests = [train.parse(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())]
    indexes = [train.prepare_first(options) for options in requests]
    state = train.start_processes()
    for options, index in zip(requests, indexes, strict=True):
        train.train_once(options, index, state)


if __name__ == "__main__":
    main()
