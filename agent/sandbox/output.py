"""What a program printed: collected in bounded memory, made safe to show, cut in the middle."""

from __future__ import annotations

import codecs
import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Control characters but tab and newline, and characters that hide or reorder text."""


_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b")


def mask_addresses(text: str) -> str:
    """Leave memory addresses out, which differ from process to process.

    Examples
    --------
    >>> mask_addresses("<A object at 0x7f00aa10>, 0x1f")
    '<A object at 0x>, 0x1f'
    """
    return _ADDRESS.sub("0x", text)


def show_controls(text: str) -> str:
    r"""Write control and invisible characters as escapes.

    Examples
    --------
    >>> print(show_controls("a\x1b[2J" + chr(0x202E)))
    a\x1b[2J\u202e
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Capture:
    r"""Decode a stream, keeping its head and tail and counting what lies between.

    Parameters
    ----------
    max_chars : int
        Characters kept, >= 2.

    Examples
    --------
    >>> capture = Capture(8)
    >>> capture.feed(b"0123456789abcdef")
    >>> capture.text()
    '0123\n... [8 characters cut] ...\ncdef'
    """

    def __init__(self, max_chars: int) -> None:
        if max_chars < 2:
            raise ValueError(f"max_chars must be >= 2, not {max_chars}")
        self.num_bytes = 0
        """Bytes fed so far."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._half = max_chars // 2
        self._head = ""
        self._tail = ""
        self._num_chars = 0

    def feed(self, data: bytes) -> None:
        """Add bytes; invalid UTF-8 becomes escapes."""
        self.num_bytes += len(data)
        self._add(self._decoder.decode(data))

    def text(self) -> str:
        """Return what was fed, its middle replaced by a marker if it was too long."""
        self._add(self._decoder.decode(b"", final=True))
        cut = self._num_chars - len(self._head) - len(self._tail)
        if cut == 0:
            return self._head + self._tail
        return f"{self._head}\n... [{cut} characters cut] ...\n{self._tail}"

    def _add(self, decoded: str) -> None:
        """Append characters to the head until it is full, then to the rolling tail."""
        shown = show_controls(decoded)
        self._num_chars += len(shown)
        room = self._half - len(self._head)
        self._head += shown[:room]
        self._tail = (self._tail + shown[room:])[-self._half :]
