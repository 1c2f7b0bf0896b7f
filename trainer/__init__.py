"""The upper floor: what runs on the compute node."""

import os

LAUNCHER = os.getppid()
"""The parent's process id, read before the imports of substance: a launcher may die in the seconds that they take."""
