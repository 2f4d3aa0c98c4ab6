"""Making tools by name."""

import pytest

from agent.sandbox import SandboxProvider
from agent.tools import TOOLS, build_tools, tools_hash
from trajectory.errors import InputError

UNSAFE = SandboxProvider("unsafe", allow_unsafe=True)


def test_tools_come_in_the_order_named():
    tools = build_tools(["python", "calculator"], UNSAFE)
    assert [tool.name for tool in tools] == ["python", "calculator"]


def test_every_row_makes_the_tool_of_its_name():
    assert [make(UNSAFE).name for make in TOOLS.values()] == list(TOOLS)


def test_an_unknown_tool_is_answered_with_the_valid_names():
    with pytest.raises(InputError, match="'abacus'; valid names: blocks, calculator"):
        build_tools(["abacus"], UNSAFE)


def test_a_tool_named_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        build_tools(["calculator", "calculator"])


def test_python_without_isolation_needs_the_flag():
    with pytest.raises(InputError, match="--allow-unsafe-tools"):
        build_tools(["python"], SandboxProvider("unsafe"))


def test_the_hash_tells_tools_and_their_order_apart():
    both = build_tools(["python", "calculator"], UNSAFE)
    hashes = {tools_hash(tools) for tools in (both, both[::-1], both[:1], ())}
    assert len(hashes) == 4
    assert all(len(digest) == 16 for digest in hashes)
    assert tools_hash(both) == tools_hash(build_tools(["python", "calculator"], UNSAFE))
