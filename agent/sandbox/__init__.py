"""Ways to run untrusted code, by name."""

from __future__ import annotations

import os
from collections.abc import Callable

from agent.sandbox.base import Sandbox
from trajectory.errors import InputError

AUTO = "auto"
"""The strongest backend this machine offers; refuses rather than run code without isolation."""


def _unsafe(allow_unsafe: bool) -> Sandbox:
    """Make the backend without isolation, if the user asked for it."""
    from agent.sandbox.unsafe import UnsafeSandbox

    if not allow_unsafe:
        raise InputError(
            "the sandbox 'unsafe' runs code written by the model as your user, without isolation: "
            "it can read and change your files and use the network; "
            "pass --allow-unsafe-tools to accept that"
        )
    return UnsafeSandbox(max_running=os.cpu_count() or 1)


def _forkjail(allow_unsafe: bool) -> Sandbox:
    """Make the backend whose isolation the kernel holds, in the strongest tier of this machine."""
    from agent.sandbox.forkjail.doctor import usable_tier
    from agent.sandbox.forkjail.sandbox import ForkjailSandbox

    tier, reasons = usable_tier()
    if tier is None:
        raise InputError(
            "this machine offers no isolation, so code written by the model is not run "
            f"({reasons}); choose --sandbox monty (a part of Python) or sandboxfusion:URL, or pass "
            "--allow-unsafe-tools to run it without isolation; `python -m agent.sandbox doctor` "
            "says more"
        )
    return ForkjailSandbox(own_namespaces=tier == "A", max_running=os.cpu_count() or 1)


def _strongest(allow_unsafe: bool) -> Sandbox:
    """Make the strongest backend; without isolation only if the user accepts that."""
    from agent.sandbox.forkjail.doctor import usable_tier

    if usable_tier()[0] is None and allow_unsafe:
        return _unsafe(allow_unsafe)
    return _forkjail(allow_unsafe)


def _monty(allow_unsafe: bool) -> Sandbox:
    """Make the backend that is an interpreter without access to the system."""
    from agent.sandbox.monty import MontySandbox

    return MontySandbox(max_running=os.cpu_count() or 1)


def _sandboxfusion(url: str) -> Sandbox:
    """Make the client of a SandboxFusion server."""
    from agent.sandbox.sandboxfusion import SandboxFusionSandbox

    return SandboxFusionSandbox(url)


SANDBOXES: dict[str, Callable[[bool], Sandbox]] = {
    "forkjail": _forkjail,
    "monty": _monty,
    "unsafe": _unsafe,
}
"""Backend makers by name; the argument says whether the user accepts missing isolation."""

SERVERS: dict[str, Callable[[str], Sandbox]] = {"sandboxfusion": _sandboxfusion}
"""Makers of backends on another machine, chosen as ``NAME:URL``; the argument is the URL."""


def build_sandbox(name: str, *, allow_unsafe: bool) -> Sandbox:
    """Make a sandbox.

    Parameters
    ----------
    name : str
        Row of `SANDBOXES`, ``auto``, or a row of `SERVERS` with its address:
        ``sandboxfusion:http://HOST:PORT``.
    allow_unsafe : bool
        Whether the user accepts missing isolation.

    Raises
    ------
    InputError
        If the name is unknown or the address is none, the backend cannot run on this machine,
        or it isolates nothing and ``allow_unsafe`` is False.
    """
    if name == AUTO:
        return _strongest(allow_unsafe)
    server, _, url = name.partition(":")
    if server in SERVERS:
        return SERVERS[server](url)
    if name not in SANDBOXES:
        valid = ", ".join([AUTO, *sorted(SANDBOXES), *(f"{row}:URL" for row in sorted(SERVERS))])
        raise InputError(f"unknown sandbox {name!r}; valid names: {valid}")
    return SANDBOXES[name](allow_unsafe)


class SandboxProvider:
    """Makes the sandbox a command was told to use, once, when a tool or checker asks for it.

    Parameters
    ----------
    name : str, default="auto"
        As `build_sandbox`.
    allow_unsafe : bool, default=False
        Whether the user accepts missing isolation.
    """

    def __init__(self, name: str = AUTO, *, allow_unsafe: bool = False) -> None:
        self._name, self._allow_unsafe = name, allow_unsafe
        self._made: Sandbox | None = None

    def __call__(self) -> Sandbox:
        """Return the sandbox.

        Raises
        ------
        InputError
            As `build_sandbox`.
        """
        if self._made is None:
            self._made = build_sandbox(self._name, allow_unsafe=self._allow_unsafe)
        return self._made

    @property
    def isolation(self) -> str:
        """That of the sandbox; empty while nothing has asked for one."""
        return "" if self._made is None else self._made.isolation

    async def close(self) -> None:
        """End the sandbox, if one was made."""
        made, self._made = self._made, None
        if made is not None:
            await made.close()
