"""Where the nodes of a job tell each other what they see: the first one listens, the others come to it.

At the port at which the run's processes will meet later. Nothing here waits longer than it was told to; a node that
was silent once is waited for no longer.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any, Protocol

from launch.untrusted_files import parse_json

_MOST_BYTES = 2**20  # of what one node says
_ATTEMPT_S = 3.0  # of a connection


class Meeting(Protocol):
    """`exchange` gives every node's value of this round by the node's number, without those that did not come."""

    def exchange(self, value: object, patience: float) -> dict[int, Any]: ...

    def close(self) -> None: ...


def meet(node: int, nodes: int, head: str, port: int, token: str, patience: float) -> Meeting:
    """Take part as node 0, which listens, or as another. OSError: the port is taken, or `head` is not reached."""
    if nodes == 1:
        return _Alone(node)
    return _Host(nodes, port, token) if node == 0 else _Guest(node, head, port, token, patience)


@dataclass(frozen=True)
class _Alone:
    node: int

    def exchange(self, value: object, patience: float) -> dict[int, Any]:
        return {self.node: value}

    def close(self) -> None:
        pass


class _Host:
    def __init__(self, nodes: int, port: int, token: str) -> None:
        self._token, self._round = token, 0
        self._expected = set(range(nodes))
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", port), family=family, backlog=nodes, dualstack_ipv6=family == socket.AF_INET6
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._heard: dict[socket.socket, bytearray] = {}
        self._of_node: dict[int, socket.socket] = {}

    def exchange(self, value: object, patience: float) -> dict[int, Any]:
        values = {0: value}
        deadline = time.monotonic() + patience
        while values.keys() < self._expected and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._read(key.fileobj, values)
        self._expected = {*values}
        answer = _line({"round": self._round, "values": values})
        for node, connection in self._of_node.items():
            if node in values:
                with contextlib.suppress(OSError):
                    connection.sendall(answer)
        self._round += 1
        return values

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.settimeout(_ATTEMPT_S)
            self._heard[connection] = bytearray()
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket, values: dict[int, Any]) -> None:
        heard = self._heard[connection]
        try:
            piece = connection.recv(2**16)
        except OSError:
            piece = b""
        heard += piece
        if not piece or len(heard) > _MOST_BYTES:
            self._selector.unregister(connection)
            connection.close()
            return
        while b"\n" in heard:
            line, _, rest = bytes(heard).partition(b"\n")
            heard[:] = rest
            said = _parse(line)
            node = said.get("node")
            ours = said.get("token") == self._token and said.get("round") == self._round
            if ours and isinstance(node, int) and node in self._expected:
                values[node] = said.get("value")
                self._of_node[node] = connection

    def close(self) -> None:
        for connection in (*self._heard, self._listener):
            connection.close()
        self._selector.close()


class _Guest:
    def __init__(self, node: int, head: str, port: int, token: str, patience: float) -> None:
        self._node, self._token, self._round = node, token, 0
        deadline = time.monotonic() + patience
        while True:
            try:
                self._connection = socket.create_connection((head, port), timeout=_ATTEMPT_S)
                break
            except OSError:  # it may begin later than this node
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)
        self._lines = self._connection.makefile("rb")

    def exchange(self, value: object, patience: float) -> dict[int, Any]:
        said = {"token": self._token, "node": self._node, "round": self._round, "value": value}
        self._connection.settimeout(patience + _ATTEMPT_S)
        self._connection.sendall(_line(said))
        answer = _parse(self._lines.readline(2 * _MOST_BYTES))
        if answer.get("round") != self._round or not isinstance(answer.get("values"), dict):
            raise ConnectionResetError("the first node has gone on without this one")
        self._round += 1
        return {int(node): given for node, given in answer["values"].items() if node.isdecimal()}

    def close(self) -> None:
        self._connection.close()


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
