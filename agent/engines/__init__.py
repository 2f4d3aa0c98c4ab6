"""Engines: what turns token ids into sampled token ids.

To add one, write ``agent/engines/<name>.py`` with a class that follows
`agent.engines.base.Engine`, add a factory and one row of `ENGINES` below; the conformance tests
run over the table.
"""

from __future__ import annotations

from collections.abc import Callable

from agent.engines.base import Engine, EngineOptions
from trajectory.errors import InputError

__all__ = ["ENGINES", "build_engine"]


def _transformers(options: EngineOptions) -> Engine:
    from agent.engines.transformers import TransformersEngine

    return TransformersEngine(options)


def _vllm(options: EngineOptions) -> Engine:
    from agent.engines.vllm import VllmEngine

    return VllmEngine(options)


def _scripted(options: EngineOptions) -> Engine:
    from agent.engines.scripted import ScriptedEngine

    return ScriptedEngine.from_options(options)


ENGINES: dict[str, Callable[[EngineOptions], Engine]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "scripted": _scripted,
}
"""Engine name to factory; heavy imports happen inside the factories."""


def build_engine(name: str, options: EngineOptions) -> Engine:
    """Make the engine of a row of `ENGINES`.

    Parameters
    ----------
    name : str
        Row of `ENGINES`.
    options : EngineOptions
        What it is built from.

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
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}")
    return ENGINES[name](options)
