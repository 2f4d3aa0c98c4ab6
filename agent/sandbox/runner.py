"""The child side of the `unsafe` backend: a program that runs code frames in one namespace.

Started by path in a fresh interpreter, it imports nothing of this project. It reads frames
``{"token", "number", "code"}`` from its control socket, runs the code as a notebook would, and
answers ``{"token", "status", "error"}``; each frame is four bytes of length, then JSON. What the
code prints goes to descriptors 1 and 2, which nobody parses, so no print can forge a frame.

What is used after the first frame is bound to names of this module when it is loaded, builtins
included, so that code which overwrites builtins or modules does not break its own later turns.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib.util
import json
import linecache
import math
import random
import resource
import signal
import socket
import struct
import sys
import types
from ast import Expr, Expression, parse
from ast import __file__ as ast_file
from builtins import (  # noqa: UP029  (bound against code that overwrites them)
    BaseException,
    SystemExit,
    compile,
    eval,
    exec,
    isinstance,
    len,
    min,
    repr,
    setattr,
    type,
)
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from io import BufferedWriter, FileIO, TextIOWrapper
from os import _exit, dup, dup2, getppid, write
from time import process_time
from traceback import format_exception

MAX_TRACEBACK_CHARS = 8_192
MAX_TRACEBACK_FRAMES = 8
MIN_RECURSION_LIMIT = 1_000
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

ceil, dumps, loads = math.ceil, json.dumps, json.loads
getrlimit, setrlimit, cpu_limit = resource.getrlimit, resource.setrlimit, resource.RLIMIT_CPU
get_recursion_limit, set_recursion_limit = sys.getrecursionlimit, sys.setrecursionlimit
pack_size, unpack_size = struct.Struct("<I").pack, struct.Struct("<I").unpack
source_lines = linecache.cache


class SeedNumpy(MetaPathFinder, Loader):
    """Seeds numpy's global generator at the moment it is first imported, and only then."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.loader: Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Take over the import of ``numpy.random`` and leave all others alone."""
        if fullname != "numpy.random" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        """Leave the making of the module to its own loader."""
        return self.loader.create_module(spec) if self.loader else None

    def exec_module(self, module: types.ModuleType) -> None:
        """Load the module, then seed it."""
        if self.loader:
            self.loader.exec_module(module)
            module.__loader__ = self.loader
            if module.__spec__ is not None:
                module.__spec__.loader = self.loader
            module.seed(self.seed % 2**32)


def confine(parent: int, memory_bytes: int, file_bytes: int) -> None:
    """Tie this process to its parent's life and set the limits that hold for all its runs."""
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if getppid() != parent:  # it died before the line above
        _exit(1)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = getrlimit(limit)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        setrlimit(limit, (most, most))


def allow_cpu(seconds: float) -> None:
    """Let this run use so much more CPU time; a backstop, the parent watches the clock."""
    soft = ceil(process_time() + seconds) + 1
    hard = getrlimit(cpu_limit)[1]
    if hard == resource.RLIM_INFINITY or soft < hard:
        setrlimit(cpu_limit, (soft, hard))


def report(error: BaseException) -> None:
    """Write the traceback to stderr, without this program's frames and bounded in length."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, ast_file):
        trace = trace.tb_next
    text = "".join(format_exception(type(error), error, trace, limit=-MAX_TRACEBACK_FRAMES))
    if len(text) > MAX_TRACEBACK_CHARS:
        half = MAX_TRACEBACK_CHARS // 2
        text = f"{text[:half]}\n... [traceback cut] ...\n{text[-half:]}"
    sys.stderr.write(text)


def evaluate(code: str, number: int, names: dict[str, object]) -> None:
    """Run a cell and echo the value of a final expression."""
    file = f"<cell {number}>"
    tree = parse(code, file)
    source_lines[file] = (len(code), None, [line + "\n" for line in code.split("\n")], file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], Expr) else None
    exec(compile(tree, file, "exec"), names)  # noqa: S102  (this program's purpose)
    if isinstance(last, Expr):
        value = eval(compile(Expression(last.value), file, "eval"), names)  # noqa: S307
        if value is not None:
            sys.stdout.write(repr(value) + "\n")


def run_cell(code: str, number: int, names: dict[str, object]) -> tuple[str, str | None]:
    """Run a cell and return its status and the name of its exception."""
    try:
        evaluate(code, number, names)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return "ok", None
        name = type(error).__name__[:80]
        try:
            report(error)
        except BaseException:  # an exception whose own text raises, or overwritten modules
            write(2, f"{name}\n".encode(errors="backslashreplace"))
        return "error", name
    return "ok", None


def fresh_streams(spare_out: int, spare_err: int) -> None:
    """Point descriptors 1 and 2 and the ``sys`` streams back at the pipes."""
    for fd, spare, name in ((1, spare_out, "stdout"), (2, spare_err, "stderr")):
        dup2(spare, fd)
        buffer = BufferedWriter(FileIO(fd, "w", closefd=False))
        stream = TextIOWrapper(buffer, "utf-8", errors="backslashreplace", line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def receive(control: socket.socket, size: int) -> bytes:
    """Read exactly ``size`` bytes; end the process where the parent has closed the socket."""
    data = b""
    while len(data) < size:
        chunk = control.recv(min(size - len(data), 1 << 20))
        if not chunk:
            _exit(0)
        data += chunk
    return data


def send(control: socket.socket, frame: dict[str, str | None]) -> None:
    """Send one frame."""
    body = dumps(frame).encode()
    control.sendall(pack_size(len(body)) + body)


def new_notebook() -> dict[str, object]:
    """Make an empty ``__main__`` module and return its names."""
    notebook = types.ModuleType("__main__")
    sys.modules["__main__"] = notebook
    notebook.__dict__["__builtins__"] = builtins
    return notebook.__dict__


def run_captured(
    code: str, number: int, names: dict[str, object], outputs: tuple[int, int], cpu_s: float
) -> tuple[str, str | None]:
    """Run a cell whose prints go to two descriptors, whatever earlier cells did to the streams."""
    if get_recursion_limit() < MIN_RECURSION_LIMIT:
        set_recursion_limit(MIN_RECURSION_LIMIT)
    fresh_streams(*outputs)
    allow_cpu(cpu_s)
    status, error = run_cell(code, number, names)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # noqa: S112  (the code closed or replaced the stream)
            continue
    return status, error


def serve(control: socket.socket, cpu_s: float) -> None:
    """Answer frames until the socket closes."""
    outputs = dup(1), dup(2)
    names = new_notebook()
    send(control, {"token": "ready"})
    while True:
        request = loads(receive(control, unpack_size(receive(control, 4))[0]))
        code, number = request["code"], request["number"]
        status, error = run_captured(code, number, names, outputs, cpu_s)
        send(control, {"token": request["token"], "status": status, "error": error})


def main() -> None:
    """Set this process up as its argument (JSON) says, then serve."""
    config = json.loads(sys.argv[1])
    confine(config["parent"], config["memory_bytes"], config["file_bytes"])
    control = socket.socket(fileno=config["control"])
    control.set_inheritable(False)
    sys.argv = [""]
    random.seed(config["seed"])
    sys.meta_path.insert(0, SeedNumpy(config["seed"]))
    serve(control, config["cpu_s"])


if __name__ == "__main__":
    main()
