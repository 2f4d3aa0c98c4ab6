"""Public formats: real rows with the labels a reader gives them, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajectory.errors import InputError
from trajectory.step_formats import FORMATS, parse_spec, read_labelled, read_ratings
from trajectory.step_formats.rows import problem_id

PROCESSBENCH = {
    "id": "gsm8k-147",
    "generator": "Qwen2-1.5B-Instruct",
    "problem": "Jame will turn 27 in 5 years.  In 8 years his cousin will be 5 years younger than "
    "twice his age.  How many years separate the age of the two now?",
    "steps": [
        "If Jame will turn 27 in 5 years, then currently he is 27 - 5 = 22 years old.",
        "In 8 years, his cousin will be 2 * 22 - 8 = 46 - 8 = 38 years old.",
        "To find out how many years separate the age of the two now, we need to subtract their "
        "current ages from each other: 38 - 22 = 16.",
        "The answer is: $\\boxed{16}$",
    ],
    "final_answer_correct": False,
    "label": 1,
}
PRMBENCH = {
    "original_question": "What is the sum of the prime numbers between 10 and 20?",
    "modified_question": "What is the sum of the prime numbers between 10 and 20?",
    "modified_process": [
        "The prime numbers between 10 and 20 are 11, 13, 16 and 19.",
        "So the sum is 11+13+16+19 = 59.",
        "Correct.",
    ],
    "modified_steps": [1, 2],
    "error_steps": [1],
    "idx": "prm_train_p1_39",
    "classification": "deception",
}
INTERCODE = {
    "run": "ic_sql_multiturn_gpt-4_10_turns",
    "model": "gpt-4",
    "task_id": 592,
    "query": "How many poker players are there?",
    "turns": [
        {
            "action": "SELECT COUNT(*) FROM poker_players",
            "observation": "Error executing query: Table 'poker_player.poker_players' doesn't "
            "exist",
            "reward": 0.0,
            "valid": False,
        },
        {
            "action": "SHOW TABLES",
            "observation": "[('people',), ('poker_player',)]",
            "reward": 0.0,
            "valid": True,
        },
        {
            "action": "SELECT COUNT(*) FROM poker_player",
            "observation": "[(5,)]",
            "reward": 1.0,
            "valid": True,
        },
    ],
    "summary": {"max_reward": 1.0, "max_reward_idx": 2, "turns_taken": 3, "turns_max": 10},
    "hardness": "easy",
}
# A real row, with the search result cut.
AGENTPROCESSBENCH = {
    "query_index": 21,
    "sample_index": 4,
    "question": "What is the name of the fight song of the university whose main campus is in "
    "Lawrence, Kansas?",
    "data_source": "searchR1_hotpotqa",
    "messages": [
        {"role": "system", "content": "You are a helpful and harmless assistant."},
        {"role": "user", "content": "Answer the given question."},
        {"role": "assistant", "content": "<tool_call>University of Kansas fight song</tool_call>"},
        {"role": "user", "content": "No effective tool call detected."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "search", "arguments": '{"query": "fight song"}'},
                }
            ],
        },
        {"role": "tool", "name": "search", "content": "I'm a Jayhawk", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "<answer>I'm a Jayhawk</answer>"},
    ],
    "step_labels": {"2": -1, "4": 0, "6": 1},
    "final_label": -1,
}
MATH_SHEPHERD = {
    "input": "What is 2 + 3 times 4? Step 1: 3 times 4 is 12. ки\nStep 2: 2 + 12 is 15. "
    "The answer is: 15 ки",
    "label": "What is 2 + 3 times 4? Step 1: 3 times 4 is 12. +\nStep 2: 2 + 12 is 15. "
    "The answer is: 15 -",
    "task": "GSM8K",
}
PENCILS = "Three pencils and a jumbo eraser cost $\\$1.24$. In cents, what is a pencil?"
FIRST = "Let's call the price of a pencil p and the price of a jumbo eraser e."


def prm800k_rows() -> list[dict[str, object]]:
    """The first steps of a real problem: good, two bad, a neutral, one that a human wrote."""
    return [
        {"instruction": PENCILS, "responses": list(before), "next_response": text, "rating": rating}
        for before, text, rating in [
            ((), FIRST, 1),
            ((FIRST,), "The first equation is 3p + e = 124, and the second", -1),
            ((FIRST,), "The first equation is 3p+e=124, and the second is", -1),
            ((FIRST,), "We could also solve this system by substitution.", 0),
            ((FIRST,), "We have $3p+e=1.24$ and $5p+e=1.82$.", None),
            ((FIRST, "We have $3p+e=1.24$ and $5p+e=1.82$."), "Subtract the first.", 1),
        ]
    ]


def write(path: Path, *rows: object) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_processbench_counts_from_zero_and_says_nothing_after_the_error(tmp_path):
    (row,) = read_labelled(f"processbench:{write(tmp_path / 'gsm8k.jsonl', PROCESSBENCH)}")
    assert row.labels.values == (None, 1.0, 0.0, None, None)
    assert row.trajectory.steps[1].text.startswith("In 8 years, his cousin")
    assert row.trajectory.meta["subset"] == "gsm8k"
    assert row.trajectory.outcome is None, "an outcome would label the last step"


def test_prmbench_counts_from_one_and_judges_the_steps_after_the_error(tmp_path):
    path = write(tmp_path / "p.jsonl", PRMBENCH, {**PRMBENCH, "error_steps": [2, 9]})
    first, second = read_ratings(f"prmbench:{path}")
    assert first.ratings == (0.0, 1.0, 1.0)
    assert second.ratings == (1.0, 0.0, 1.0)
    assert first.trajectory.meta["repeated"] is False
    assert second.trajectory.meta["repeated"] is True
    assert second.trajectory.meta["error_steps_past_the_end"] == 1


def test_agentprocessbench_labels_stand_at_message_indices(tmp_path):
    (row,) = read_ratings(f"agentprocessbench:{write(tmp_path / 'h.jsonl', AGENTPROCESSBENCH)}")
    assert row.ratings == (0.0, "neutral", 1.0)
    first, second, last = row.trajectory.steps
    assert first.calls[0].name == "respond"
    assert first.observations[0].content == "No effective tool call detected."
    assert second.observations[0].content == "I'm a Jayhawk"
    assert last.text == "<answer>I'm a Jayhawk</answer>"


def test_intercode_runs_are_one_rollout_from_every_prefix(tmp_path):
    with gzip.open(tmp_path / "r.jsonl.gz", "wt") as file:
        file.write(json.dumps(INTERCODE) + "\n")
    (row,) = read_labelled(f"intercode:{tmp_path / 'r.jsonl.gz'}")
    assert row.trajectory.outcome == 1.0
    assert row.evidence.rollouts == row.evidence.correct == (1, 1, 1, 1)
    assert row.labels.values == (1.0, 1.0, 1.0, 1.0)
    assert [s.observations[0].error for s in row.trajectory.steps] == ["invalid_action", None, None]
    assert row.trajectory.task.task_id == "intercode-sql-592"
    assert row.trajectory.policy == "gpt-4"


def test_an_intercode_run_with_part_of_the_reward_failed(tmp_path):
    turns = [{**turn, "reward": 0.67} for turn in INTERCODE["turns"]]
    rows = {**INTERCODE, "turns": turns, "summary": {"max_reward": 0.67}}
    (row,) = read_labelled(f"intercode:{write(tmp_path / 'r.jsonl', rows)}")
    assert row.trajectory.outcome == 0.0
    assert row.evidence.correct == (0, 0, 0, 0)


def test_math_shepherd_marks_are_read_at_the_tags(tmp_path):
    (row,) = read_labelled(f"math_shepherd:{write(tmp_path / 'm.jsonl', MATH_SHEPHERD)}")
    assert row.trajectory.task.prompt == "What is 2 + 3 times 4?"
    assert [s.text for s in row.trajectory.steps] == [
        "Step 1: 3 times 4 is 12.",
        "Step 2: 2 + 12 is 15. The answer is: 15",
    ]
    assert row.labels.values == (None, 1.0, 0.0)


def test_prm800k_rows_become_one_trajectory_per_leaf_and_every_rating_counts_once(tmp_path):
    rows = read_ratings(f"prm800k:{write(tmp_path / 'p.jsonl', *prm800k_rows())}")
    assert [row.ratings for row in rows] == [
        (1.0, 0.0),
        (None, 0.0),
        (None, "neutral"),
        (None, None, 1.0),
    ]
    assert len({row.trajectory.task.task_id for row in rows}) == 1


def test_a_prm800k_step_rated_twice_and_differently_has_no_rating(tmp_path):
    rows = prm800k_rows()
    again = [{**rows[1], "rating": 1}, rows[2]]
    read = read_ratings(f"prm800k:{write(tmp_path / 'p.jsonl', *rows, *again)}")
    assert [row.ratings for row in read][:2] == [(1.0, None), (None, 0.0)]


@pytest.mark.parametrize(("neutral", "label"), [("good", 1.0), ("bad", 0.0), ("mask", None)])
def test_neutral_steps_become_what_is_asked_for(tmp_path, neutral, label):
    path = write(tmp_path / "p.jsonl", *prm800k_rows())
    rows = read_labelled(f"prm800k:{path}", neutral=neutral)
    assert rows[2].labels.values == (None, None, label)


def test_neutral_steps_without_a_decision_are_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", *prm800k_rows())
    with pytest.raises(InputError, match=r"p\.jsonl, line 4: .*neutral.*--neutral good"):
        read_labelled(f"prm800k:{path}")


def test_a_decision_without_neutral_steps_is_refused(tmp_path):
    path = write(tmp_path / "gsm8k.jsonl", PROCESSBENCH)
    with pytest.raises(InputError, match="no step is rated neutral"):
        read_labelled(f"processbench:{path}", neutral="good")


TRL = {"prompt": "What is 7*6+1?", "completions": ["7*6 is 42.", "So 44."], "labels": [True, False]}
CHAT = {
    "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}],
}
BAD = [
    ("trl", {**TRL, "labels": [True]}, "1 labels for 2 steps"),
    ("trl", {**TRL, "labels": [0.2, 1.5]}, r"label 1.5 of step 1 is not in \[0, 1\]"),
    ("trl", {**TRL, "labels": [None, None]}, "labels: the row has no label"),
    ("trl", {"prompt": "x", "completions": ["y"]}, "labels: Field required"),
    ("processbench", {**PROCESSBENCH, "label": 4}, "label 4 names none of the 4 steps"),
    ("prmbench", {**PRMBENCH, "error_steps": [0]}, "they count from 1"),
    ("math_shepherd", {**MATH_SHEPHERD, "label": "What"}, "in place of tag 1"),
    ("math_shepherd", {"input": "no steps", "label": "no steps"}, "no step to label"),
    (
        "agentprocessbench",
        {**AGENTPROCESSBENCH, "step_labels": {"2": 1, "4": 1}},
        "every assistant message needs one",
    ),
    ("agentprocessbench", {**AGENTPROCESSBENCH, "messages": []}, "labels without messages"),
    ("intercode", {**INTERCODE, "run": "other"}, "run: String should match"),
    (
        "intercode",
        {**INTERCODE, "turns": [{**INTERCODE["turns"][0], "reward": None}], "summary": {}},
        "no outcome",
    ),
    ("messages", CHAT, "the row has no label"),
    ("messages", {**CHAT, "rollouts": [4, 4], "correct": [1, 5]}, "prefix 1 has 5 correct of 4"),
    ("messages", {**CHAT, "rollouts": [4], "correct": [1]}, "both need 2, from the prompt on"),
    ("messages", {**CHAT, "labels": [1.0, 0.0]}, "2 labels for 1 steps"),
    ("prm800k", {**prm800k_rows()[0], "rating": 2}, "rating"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, name, row, message):
    good = {"processbench": PROCESSBENCH, "prmbench": PRMBENCH, "trl": TRL}.get(name)
    lines = [good, row] if good else [row]
    path = write(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(InputError, match=rf"rows\.jsonl, line {len(lines)}: .*{message}"):
        read_ratings(f"{name}:{path}")


def test_other_bad_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt"\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: not JSON"):
        read_ratings(f"trl:{tmp_path / 'a.jsonl'}")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(TRL).encode() * 50)[:-9])
    with pytest.raises(InputError, match="not a whole gzip file"):
        read_ratings(f"trl:{tmp_path / 'b.jsonl.gz'}")
    (tmp_path / "c.txt").write_text("")
    with pytest.raises(InputError, match="is no data file"):
        read_ratings(f"trl:{tmp_path / 'c.txt'}")
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no rows of format trl"):
        read_ratings(f"trl:{tmp_path / 'd.jsonl'}")
    with pytest.raises(InputError, match="is the id of the row at"):
        read_ratings(f"processbench:{write(tmp_path / 'e.jsonl', PROCESSBENCH, PROCESSBENCH)}")


@pytest.mark.parametrize("spec", ["data.jsonl", "csv:data.jsonl", "trl:"])
def test_an_unknown_format_gets_the_list(spec):
    with pytest.raises(InputError, match="trl, processbench"):
        parse_spec(spec)


def test_json_lists_and_parquet_tables_are_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "rows.json").write_text(json.dumps([TRL, TRL]))
    pq.write_table(pa.Table.from_pylist([TRL, TRL]), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        rows = read_labelled(f"trl:{tmp_path / name}")
        assert [row.labels.values for row in rows] == [(None, 1.0, 0.0)] * 2


SOURCES = [
    ("trl", TRL),
    ("processbench", PROCESSBENCH),
    ("math_shepherd", MATH_SHEPHERD),
    ("messages", {**CHAT, "labels": [0.25]}),
    ("messages", {**CHAT, "rollouts": [4, 8], "correct": [1, 8]}),
]


@pytest.mark.parametrize(("name", "row"), SOURCES)
def test_what_is_written_reads_back_the_same(tmp_path, name, row):
    rows = read_labelled(f"{name}:{write(tmp_path / 'in.jsonl', row)}")
    writer = FORMATS[name].write
    assert writer is not None
    assert writer(tmp_path / "out.jsonl", rows) == 1
    (again,) = read_labelled(f"{name}:{tmp_path / 'out.jsonl'}")
    (first,) = rows
    assert again.labels.values == first.labels.values
    assert again.evidence.rollouts == first.evidence.rollouts
    assert [s.text for s in again.trajectory.steps] == [s.text for s in first.trajectory.steps]
    assert again.trajectory.task == first.trajectory.task


def test_a_masked_step_has_no_place_in_trl(tmp_path):
    rows = read_labelled(f"processbench:{write(tmp_path / 'in.jsonl', PROCESSBENCH)}")
    writer = FORMATS["trl"].write
    assert writer is not None
    with pytest.raises(InputError, match="step 2 has no label"):
        writer(tmp_path / "out.jsonl", rows)
    assert not (tmp_path / "out.jsonl").exists(), "nothing half-written"


@given(st.lists(st.sampled_from([1.0, 0.0, 0.25, 0.75]), min_size=1, max_size=6), st.data())
def test_trl_rows_survive_the_round_trip(tmp_path_factory, labels, data):
    folder = tmp_path_factory.mktemp("trl")
    steps = [data.draw(st.text(st.characters(codec="utf-8"), max_size=8)) for _ in labels]
    row = {"prompt": "p", "completions": steps, "labels": labels}
    rows = read_labelled(f"trl:{write(folder / 'in.jsonl', row)}")
    writer = FORMATS["trl"].write
    assert writer is not None
    writer(folder / "out.jsonl", rows)
    (again,) = read_labelled(f"trl:{folder / 'out.jsonl'}")
    assert again.labels.values[1:] == tuple(labels)
    assert [s.text for s in again.trajectory.steps] == steps


def test_a_problem_has_one_name_across_data_sets():
    assert problem_id("Find $x$ if 2x = 6.") == problem_id("find x  if $2x=6$")
    assert problem_id("Find x if 2x = 6.") != problem_id("Find x if 2x = -6.")
