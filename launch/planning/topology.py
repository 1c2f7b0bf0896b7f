"""Which processes train: the strategy, how many on how many machines, with what GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Topology:
    """How many processes of which strategy, and what they run on."""

    strategy: str
    """A name of `launch.strategies.STRATEGIES`, or `AUTO`; another one is refused when a plan is made."""
    nodes: int
    """Machines."""
    gpus_per_node: int
    """Processes on each machine, on CPUs too."""
    device: str
    """`cuda` or `cpu`."""
    gpu_memory: int | None = None
    """Bytes of the smallest GPU; None where that is not known."""
    packages_here: bool = True
    """The run uses this Python's packages, so that their versions can be judged here."""
    strategy_reason: str = field(default="", compare=False)
    """Why `strategy` was taken where `AUTO` was asked for; empty: it was named."""

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.gpus_per_node
