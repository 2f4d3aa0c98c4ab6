"""Engines: what turns token ids into sampled token ids.

To add one, write ``agent/engines/<name>.py`` with a class that follows
`agent.engines.base.Engine`, add a factory and one row of `ENGINES` below; the conformance tests
run over the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agent.engines.base import Engine, EngineOptions
from agent.engines.checks import check_options
from agent.engines.servers import parse_servers
from trajectory.errors import InputError

__all__ = ["ENGINES", "build_engine", "check_engine"]


def _transformers(options: EngineOptions) -> Engine:
    from agent.engines.transformers import TransformersEngine

    return TransformersEngine(options)


def _vllm(options: EngineOptions) -> Engine:
    from agent.engines.vllm import VllmEngine

    return VllmEngine(options)


def _scripted(options: EngineOptions) -> Engine:
    from agent.engines.scripted import ScriptedEngine

    return ScriptedEngine.from_options(options)


def _http(options: EngineOptions) -> Engine:
    from agent.engines.http import HttpEngine

    return HttpEngine(options, parse_servers(options.argument))


ENGINES: dict[str, Callable[[EngineOptions], Engine]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "scripted": _scripted,
    "http": _http,
}
"""Engine name to factory; heavy imports happen inside the factories."""


def check_engine(name: str) -> None:
    """Refuse the name of an engine that cannot be built, before any work is done.

    Parameters
    ----------
    name : str
        Row of `ENGINES`; for ``http`` a colon and the servers follow (`parse_servers`).

    Raises
    ------
    InputError
        If there is no such row, the servers are missing or malformed, or something follows the
        name of another engine.
    """
    row, colon, argument = name.partition(":")
    if row not in ENGINES:
        raise InputError(f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}")
    if row == "http":
        parse_servers(argument)
    elif colon:
        raise InputError(f"the engine {row} takes nothing after its name, not {argument!r}")


def build_engine(name: str, options: EngineOptions) -> Engine:
    """Make the engine of a row of `ENGINES`.

    Parameters
    ----------
    name : str
        Row of `ENGINES`; for ``http`` a colon and the servers follow.
    options : EngineOptions
        What it is built from; ``argument`` is replaced by what follows the name.

    Returns
    -------
    Engine
        Ready to generate (an engine with worker processes starts them at the first request).

    Raises
    ------
    InputError
        If the name is unknown, an option is out of range, the model cannot be loaded or served,
        or an optional package is missing.
    """
    row, _, argument = name.partition(":")
    check_options(options)
    check_engine(name)
    return ENGINES[row](replace(options, argument=argument))
