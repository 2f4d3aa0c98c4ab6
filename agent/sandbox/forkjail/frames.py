"""Frames between trusted processes: four bytes of length, JSON, and file descriptors beside."""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

Frame = dict[str, Any]
_MAX_DESCRIPTORS = 16


def pack(frame: Frame) -> bytes:
    """Return a frame's bytes."""
    body = json.dumps(frame).encode()
    return struct.pack("<I", len(body)) + body


def send(sock: socket.socket, frame: Frame, descriptors: Sequence[int] = ()) -> None:
    """Send a frame on a blocking socket; the receiver gets copies of the descriptors.

    Raises
    ------
    OSError
        If the other side is gone.
    """
    data = pack(frame)
    sent = socket.send_fds(sock, [data], list(descriptors)) if descriptors else sock.send(data)
    if sent < len(data):
        sock.sendall(data[sent:])


class Reader:
    """Takes frames apart as bytes come in."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._descriptors: list[int] = []

    def receive(self, sock: socket.socket) -> bool:
        """Read what is there; False at the end of the stream.

        Raises
        ------
        BlockingIOError
            If nothing is there on a non-blocking socket.
        """
        try:
            data, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, _MAX_DESCRIPTORS)
        except (ConnectionResetError, BrokenPipeError):
            return False
        self._data += data
        self._descriptors += descriptors
        return bool(data)

    def frames(self) -> list[tuple[Frame, list[int]]]:
        """Return the complete frames; descriptors go to the first that asks for them.

        A frame says how many it brought as ``fds``.
        """
        found = []
        while len(self._data) >= 4:
            (size,) = struct.unpack_from("<I", self._data)
            if len(self._data) < 4 + size:
                break
            frame = json.loads(bytes(self._data[4 : 4 + size]))
            del self._data[: 4 + size]
            count = frame.get("fds", 0)
            taken, self._descriptors = self._descriptors[:count], self._descriptors[count:]
            found.append((frame, taken))
        return found


def receive_from_cell(sock: socket.socket) -> tuple[bytes, int, list[int]]:
    """Read one packet of an untrusted process.

    Returns
    -------
    data : bytes
        Empty at the end.
    pid : int
        The sender's, from the kernel; 0 if it sent none.
    descriptors : list of int
        What it passed; the caller closes them.
    """
    room = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS)
    try:
        data, extras, _, _ = sock.recvmsg(4096, room)
    except BlockingIOError:
        raise
    except OSError:
        return b"", 0, []
    pid, descriptors = 0, array.array("i")
    for level, kind, content in extras:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_CREDENTIALS:
            pid = struct.unpack("iii", content)[0]
        elif kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) // 4 * 4])
    return data, pid, list(descriptors)


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in descriptors:
        os.close(fd)
