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


SANDBOXES: dict[str, Callable[[bool], Sandbox]] = {"unsafe": _unsafe}
"""Backend makers by name; the argument says whether the user accepts missing isolation."""


def build_sandbox(name: str, *, allow_unsafe: bool) -> Sandbox:
    """Make a sandbox.

    Raises
    ------
    InputError
        If the name is unknown, the backend cannot run on this machine, or it isolates nothing
        and ``allow_unsafe`` is False.
    """
    if name == AUTO:
        return _unsafe(allow_unsafe)
    if name not in SANDBOXES:
        valid = ", ".join([AUTO, *sorted(SANDBOXES)])
        raise InputError(f"unknown sandbox {name!r}; valid names: {valid}")
    return SANDBOXES[name](allow_unsafe)


class SandboxProvider:
    """Makes the sandbox a command was told to use, once, when a tool or checker asks for it.

    Parameters
    ----------
    name : str, default="auto"
        Row of `SANDBOXES`, or ``auto``.
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

    async def close(self) -> None:
        """End the sandbox, if one was made."""
        made, self._made = self._made, None
        if made is not None:
            await made.close()
