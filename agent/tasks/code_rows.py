"""Programming problems in the formats of HumanEval and MBPP, told without their tests."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence

from agent.tasks.code_tests import META, HiddenTests
from agent.tasks.rows import Row
from trajectory.errors import InputError
from trajectory.records import JsonValue

_MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
"""First and last ``task_id`` of the splits of MBPP, as published."""


def read_row(row: Row) -> Row:
    """Turn a row of either format into the columns of a task.

    Parameters
    ----------
    row : mapping
        HumanEval: ``prompt``, ``entry_point``, ``canonical_solution``, ``test``. MBPP: ``text``,
        ``code``, ``test_list`` and ``test_setup_code``. Both: ``task_id``, and ``split`` where
        it is given.

    Raises
    ------
    InputError
        If it is neither, or its code does not parse.
    """
    if "entry_point" in row:
        task = _humaneval(row)
    elif "test_list" in row:
        task = _mbpp(row)
    else:
        raise InputError(
            "neither HumanEval (columns prompt, entry_point, canonical_solution, test) nor MBPP "
            "(text, code, test_list)"
        )
    kept: dict[str, JsonValue] = {"split": row["split"]} if "split" in row else {}
    return {"id": row.get("task_id"), **task, **kept}


def _humaneval(row: Row) -> dict[str, JsonValue]:
    """Read a row of HumanEval: the prompt's imports and helpers belong to both boxes."""
    prompt, solution, test = (_text(row, k) for k in ("prompt", "canonical_solution", "test"))
    entry = _text(row, "entry_point")
    tests = f"{test}\n\ncheck({entry})\n"
    _parsed("prompt", prompt), _parsed("test", tests), _parsed("solution", prompt + solution)
    hidden = HiddenTests(
        given=prompt, objects_code="", setup=prompt, tests=tests, functions=(entry,)
    )
    return {
        "problem": f"Complete this Python function.\n\n{prompt.strip()}",
        "answer": prompt + solution,
        META: hidden.as_meta(),
    }


def _mbpp(row: Row) -> dict[str, JsonValue]:
    """Read a row of MBPP: what the tests use of the solution but functions is given."""
    code, text = _text(row, "code").replace("\r\n", "\n"), _text(row, "text")
    setup = str(row.get("test_setup_code") or "").replace("\r\n", "\n")
    listed = row["test_list"]
    tests = "\n".join(map(str, listed)) if isinstance(listed, list) else ""
    gold, used = _parsed("code", code), _names(_parsed("test_list", tests))
    made = _parsed("test_setup_code", setup)
    functions = _defined(gold, ast.FunctionDef) & used
    if not functions:
        raise InputError("the column 'test_list' calls no function that the column 'code' defines")
    classes = _defined(gold, ast.ClassDef)
    beside = bool(_names(made) & (classes | functions))  # objects of classes of the solution
    imports = [node for node in gold.body if isinstance(node, ast.Import | ast.ImportFrom)]
    objects = sorted(_assigned(made) & used) if beside else []
    constructors = sorted(classes & used)
    given = [*imports, *(node for node in gold.body if isinstance(node, ast.ClassDef))]
    hidden = HiddenTests(
        given=_source(given) if beside or constructors else "",
        objects_code=setup if beside else "",
        setup="\n".join([_source(imports), "" if beside else setup]),
        tests=tests,
        functions=tuple(sorted(functions)),
        constructors=tuple(constructors),
        objects=tuple(objects),
    )
    given_words = f"\n\nGiven:\n{hidden.given}" if hidden.given else ""
    task: dict[str, JsonValue] = {
        "problem": f"{text.strip()}\n{_example(tests, functions)}{given_words}",
        "answer": code,
        META: hidden.as_meta(),
    }
    number = row.get("task_id")
    split = next((s for s, (a, z) in _MBPP_SPLITS.items() if number in range(a, z + 1)), None)
    return {**task, "split": split} if split else task


def _example(tests: str, functions: set[str]) -> str:
    """Say how the function is called, with the arguments of one test but without its value.

    Examples
    --------
    >>> _example("assert add(1, [2]) == [3]", {"add"})
    'Define the function add. It is called like this: add(1, [2]), and returns a list.'
    """
    tree = _parsed("test_list", tests)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id not in functions:
                continue
            said = f"It is called like this: {ast.unparse(node)}"
            kind = next((k for k in map(_kind, ast.walk(tree)) if k[0] is node), (node, ""))[1]
            known = f", and returns {kind}" if kind else ""
            return f"Define the function {node.func.id}. {said}{known}."
    return f"Define {', '.join(sorted(functions))}."


def _kind(node: ast.AST) -> tuple[ast.expr | None, str]:
    """Return the left side of ``x == literal``, and the type of the literal with its article."""
    if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.Eq):
        return None, ""
    try:
        value = ast.literal_eval(node.comparators[0])
    except (ValueError, TypeError):
        return None, ""
    name = "None" if value is None else type(value).__name__
    article = "" if value is None else "an " if name == "int" else "a "
    return node.left, article + name


def _text(row: Row, column: str) -> str:
    """Return a column that must hold a text."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"the column {column!r} must hold a text")
    return value


def _parsed(column: str, code: str) -> ast.Module:
    """Parse code of the data set."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # stray backslashes, of which MBPP is full
            return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"the column {column!r} holds no Python code: {error}") from error


def _defined(tree: ast.Module, kind: type[ast.FunctionDef | ast.ClassDef]) -> set[str]:
    """Return the names of the top-level definitions of a kind."""
    return {node.name for node in tree.body if isinstance(node, kind)}


def _names(tree: ast.Module) -> set[str]:
    """Return all names that are mentioned."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _assigned(tree: ast.Module) -> set[str]:
    """Return the names that are assigned at the top level."""
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _source(nodes: Sequence[ast.stmt]) -> str:
    """Write statements as code."""
    return "\n".join(map(ast.unparse, nodes))
