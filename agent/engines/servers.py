"""Reads which servers the engine ``http`` is to ask: URLs, or a file that lists them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from trajectory.errors import InputError

_USAGE = "give --engine http:URL[,URL...], for instance http:http://127.0.0.1:8000"
_LIMITS = {"patience": "patience_s", "timeout": "timeout_s"}
"""Name on the command line to field of `Servers`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Servers:
    """Where the policy is served, and how long to wait for it."""

    urls: tuple[str, ...]
    """``http[s]://host[:port][/path]``, without ``/v1``; each once."""
    patience_s: float = 120.0
    """Time for which no server need be there before generation ends with an error, seconds."""
    timeout_s: float = 600.0
    """Longest that one generation may take on one server, seconds."""
    backoff_s: float = 1.0
    """Time out after a first failure, seconds; it doubles with every further one."""
    check_s: float = 10.0
    """A working server is asked this often, and given this long, to say that it lives, seconds."""


def parse_servers(argument: str) -> Servers:
    """Read what follows ``http:`` in the name of an engine.

    Parameters
    ----------
    argument : str
        Items separated by commas: URLs, files with one URL a line (``#`` begins a comment),
        ``patience=SECONDS``, ``timeout=SECONDS``.

    Raises
    ------
    InputError
        If an item is none of these, a URL holds a password or a query, a server is named twice, or
        none is named.

    Examples
    --------
    >>> parse_servers("http://a:8000/v1,https://b,patience=30")
    ... # doctest: +NORMALIZE_WHITESPACE
    Servers(urls=('http://a:8000', 'https://b'), patience_s=30.0, timeout_s=600.0,
            backoff_s=1.0, check_s=10.0)
    """
    urls: list[str] = []
    limits: dict[str, float] = {}
    for item in (part.strip() for part in argument.split(",")):
        name, _, value = item.partition("=")
        if name in _LIMITS:
            limits[_LIMITS[name]] = _seconds(name, value)
        elif item:
            urls += map(_url, _listed(item))
    if not urls:
        raise InputError(f"the engine http names no server: {_USAGE}")
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise InputError(f"the engine http names the server {twice[0]} twice: name each once")
    return Servers(urls=tuple(urls), **limits)


def _listed(item: str) -> Iterator[str]:
    """Yield the URLs that an item stands for: itself, or the lines of a file."""
    if item.startswith(("http://", "https://")):
        yield item
        return
    path = Path(item)
    if not path.is_file():
        raise InputError(f"the engine http: {item!r} is neither a URL nor a file of URLs: {_USAGE}")
    for line in path.read_text(encoding="utf-8").splitlines():
        url = line.partition("#")[0].strip()
        if url:
            yield url


def _url(text: str) -> str:
    """Bring a server's address into its one form.

    It goes into manifests and messages, so it must not hold a secret.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InputError(f"the engine http: {text!r} is no URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InputError(f"the engine http: {text!r} is not the URL of a server: {_USAGE}")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            f"the URL of the server {parts.hostname} must hold no name, password or query, since "
            "it is written into manifests: put a token into the environment variable "
            "TOOLPRM_SERVER_TOKEN"
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{parts.netloc.lower()}{path}"


def _seconds(name: str, value: str) -> float:
    """Read a positive number of seconds."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"the engine http: {name} must be seconds above 0, not {value!r}")
    return seconds
