"""From a specification to a domain."""

import pytest

from agent.tasks import parse_tasks
from trajectory.errors import InputError


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("arithmetic", "arithmetic"),
        ("arithmetic:operations=2-6,distractors=1", "arithmetic"),
        ("math:a.jsonl", "math"),
        ("math:hf:owner/name", "math"),
        ("a.jsonl", "jsonl"),
        ("jsonl:a.txt", "jsonl"),
        ("sql:a.jsonl,databases=b,thinned=2", "sql"),
        ("C:a.jsonl", "jsonl"),
    ],
)
def test_a_specification_names_a_domain(spec, name):
    assert parse_tasks(spec).name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("algebra", "unknown tasks 'algebra'; valid: arithmetic, .*jsonl, math"),
        ("", "unknown tasks ''"),
        ("math", "needs a source"),
        ("jsonl:", "needs a file"),
        ("arithmetic:operations", "'operations' is no option"),
        ("arithmetic:operations=", "is no option"),
        ("arithmetic:operations=2-4,operations=3-5", "given twice"),
    ],
)
def test_a_bad_specification_is_refused(spec, message):
    with pytest.raises(InputError, match=message):
        parse_tasks(spec)
