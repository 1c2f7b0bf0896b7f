"""Whether the nodes of a job reach each other over the interface that their processes will use, and who does not."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

from launch.doctor.finding import Finding

_PATIENCE_S = 3.0  # for one connection
_AT_ONCE = 32


def own_address(interface: str, device: str) -> str:
    """The IPv4 address of an interface; without one, what the processes would take. ValueError: why there is none.

    gloo (torch 2.14) takes the address of the machine's name; NCCL (2.28) an interface that begins with `ib`, else the
    first that is neither loopback nor Docker's.
    """
    addresses = psutil.net_if_addrs()
    if not interface and device == "cuda":
        interface = min(
            filter(_is_up_and_real, addresses), key=lambda name: not name.startswith("ib"), default=""
        )
        if not interface:
            raise ValueError(f"no interface is up (of {', '.join(sorted(addresses))})")
    if not interface:
        try:
            return socket.gethostbyname(socket.gethostname())
        except OSError as error:
            raise ValueError(f"its own name {socket.gethostname()} has no address ({error})") from None
    if interface not in addresses:
        raise ValueError(f"there is no interface {interface} (but {', '.join(sorted(addresses))})")
    if not psutil.net_if_stats()[interface].isup:
        raise ValueError(f"the interface {interface} is down")
    found = [str(each.address) for each in addresses[interface] if each.family == socket.AF_INET]
    if not found:
        raise ValueError(f"the interface {interface} has no IPv4 address")
    return found[0]


def _is_up_and_real(interface: str) -> bool:
    return (
        not interface.startswith(("lo", "docker", "virbr", "veth")) and psutil.net_if_stats()[interface].isup
    )


def listen(address: str, nodes: int) -> socket.socket:
    """A socket that the other nodes can connect to: the kernel answers them, nobody needs to accept. OSError."""
    return socket.create_server((address, 0), backlog=max(nodes, 8))


def unreachable(own: str, places: Mapping[int, Sequence[object]]) -> list[int]:
    """Of the nodes that listen at these (address, port), those that cannot be reached from the own address."""

    def fails(node: int) -> bool:
        address, port = places[node]
        try:
            with socket.create_connection((str(address), int(str(port))), _PATIENCE_S, (own, 0)):
                return False
        except (OSError, ValueError):
            return True

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [node for node, bad in zip(places, pool.map(fails, places), strict=True) if bad]


def broken_pairs(missed: Mapping[int, Collection[int]]) -> set[frozenset[int]]:
    """The pairs of nodes of which one does not reach the other. `missed`: node -> those that it does not reach."""
    return {frozenset((node, other)) for node, others in missed.items() for other in others if node != other}


def culprits(pairs: Collection[frozenset[int]], nodes: int) -> set[int]:
    """Nodes that are apart from more than half of the others: of two, both."""
    apart = {node: sum(node in pair for pair in pairs) for pair in pairs for node in pair}
    return {node for node, count in apart.items() if 2 * count > nodes - 1}


def judge_links(
    node: int, names: Mapping[int, str], missed: Mapping[int, Collection[int]], interface: str
) -> Iterator[Finding]:
    """What is wrong with this node's connections: its own fault, or a pair's that no culprit explains."""
    pairs = broken_pairs(missed)
    guilty = culprits(pairs, len(names))
    mine = {
        other
        for pair in pairs
        if node in pair and (node in guilty or not pair & guilty)
        for other in pair - {node}
    }
    over = f"over {interface}" if interface else "over the interface of its name's address"
    if mine:
        others = ", ".join(names.get(other, str(other)) for other in sorted(mine))
        yield Finding(
            "network",
            "failed",
            f"no connection {over} with {others}",
            "look at cable, route and firewall of this node; or choose another `network_interface` in the site's file",
        )
    else:
        yield Finding(
            "network", "ok", f"connections {over} with {len(names) - 1 - len(guilty - {node})} nodes"
        )
