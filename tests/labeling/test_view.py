import json
import re
from dataclasses import replace

import pytest
from hypothesis import given

from labeling.view import ViewConfig, view
from labeling.view_page import embed, histogram, index_entry, outcome_of, summarise
from tests.examples import json_values, make_labelled, make_scores, make_trajectory
from tests.labeling.pages import (
    HOSTILE,
    Page,
    admitted,
    folder_of,
    hostile_row,
    row_with,
    several_calls,
    small_rows,
)
from trajectory.errors import InputError
from trajectory.records import StopReason
from trajectory.run import open_run, read_manifest
from trajectory.store import read_labels, write_jsonl

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def page_of(folder, tmp_path, **changes):
    out = tmp_path / "report.html"
    report = view(ViewConfig(labels=folder, out=out, **changes))
    return Page(out), report


# --- the data inside the page -------------------------------------------------------------------


@given(json_values)
def test_embedded_data_reads_back_and_holds_no_markup(value):
    text = embed(value)
    assert json.loads(text) == value
    assert not re.search("[<>&\u2028\u2029\n]", text)


def test_embedded_data_keeps_lone_surrogates():
    assert json.loads(embed("\ud800<")) == "\ud800<"
    embed("\ud800").encode("utf-8")


def test_hostile_text_comes_back_whole_and_ends_no_element(tmp_path):
    page, _ = page_of(
        folder_of(tmp_path / HOSTILE[:40].replace("/", "_"), [hostile_row()]), tmp_path
    )
    plain, _ = page_of(folder_of(tmp_path / "plain", [make_labelled(2)]), tmp_path)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    entry, detail = page.index[0], page.details[0]
    assert {entry[key] for key in ("i", "k", "q", "a", "g")} == {HOSTILE}
    first = detail["s"][0]
    assert first["x"] == first["m"] == first["c"][0][0] == first["o"][0][0] == HOSTILE
    assert HOSTILE in page.summary["made"]


def test_the_policy_admits_the_two_inline_texts_and_nothing_else(tmp_path):
    page, _ = page_of(folder_of(tmp_path / "labels", [hostile_row()]), tmp_path)
    rules = dict(rule.split(" ", 1) for rule in page.policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == admitted(page.scripts["program"])
    assert [rules["style-src"]] == [admitted(style) for style in page.styles]
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in page.policy


def test_the_page_names_no_address_to_load(tmp_path):
    page, _ = page_of(folder_of(tmp_path / "labels", small_rows()), tmp_path)
    attributes = [a for _, attributes in page.elements for a in attributes]
    assert not {"src", "href", "action", "srcset", "style"} & set(attributes)
    assert not [a for a in attributes if a.startswith("on")]


# --- what is said of a trajectory ---------------------------------------------------------------


def test_an_entry_holds_values_intervals_and_counts_of_every_prefix():
    row = row_with("t", (None, 0.123456, 1.0))
    entry = index_entry(row, make_scores(row.trajectory))
    assert entry["v"] == [None, 0.1235, 1.0]
    assert entry["l"] == [None, 0.0235, 0.9]
    assert entry["n"] == [4, 4, 4]
    assert (entry["c"], entry["u"], entry["f"]) == ([0, 0, 4], [0, 0, 0], [4, 0, 0])
    assert entry["w"] is None
    reused = replace(row, evidence=replace(row.evidence, reused=(0, 1, 2)))
    assert index_entry(reused)["w"] == [0, 1, 2]
    assert entry["p"] == [0.0, 0.3333, 0.6667]
    assert index_entry(row)["p"] is None


@pytest.mark.parametrize(
    ("stop", "outcome", "said"),
    [
        (StopReason.ANSWERED, 1.0, "right"),
        (StopReason.ANSWERED, 0.5, "right"),
        (StopReason.ANSWERED, 0.25, "wrong"),
        (StopReason.MALFORMED, 0.0, "wrong"),
        (StopReason.MAX_STEPS, None, "cut off"),
        (StopReason.MAX_TOKENS, None, "cut off"),
        (StopReason.TOOL_FAILURE, None, "broken"),
        (StopReason.ENGINE_FAILURE, None, "broken"),
    ],
)
def test_truncated_and_broken_are_not_wrong(stop, outcome, said):
    assert outcome_of(make_trajectory(stop=stop, outcome=outcome)) == said


def test_the_summary_counts_by_hand():
    found = summarise(small_rows())
    assert found["trajectories"] == 4
    assert found["outcomes"] == {"right": 2, "wrong": 1, "cut off": 1}
    assert found["stops"] == {"answered": 3, "max_steps": 1}
    assert found["unknown"] == 1
    before = {5: 2, 10: 2, 15: 2}
    assert {i: n for i, n in enumerate(found["values"]["before"]) if n} == before
    assert {i: n for i, n in enumerate(found["values"]["end"]) if n} == {0: 1, 10: 2, 19: 1}
    assert sum(found["widths"]["before"]) == 6
    widths = [0.2] * 4 + [0.6, 0.15, 0.1] + [0.2, 0.1] + [0.2]
    assert found["mean_width"] == pytest.approx(sum(widths) / len(widths))


def test_a_histogram_of_nothing_known_is_empty():
    assert set(histogram([(None, None)])["before"]) == {0}
    assert summarise([])["mean_width"] is None


# --- a real run ---------------------------------------------------------------------------------


def test_a_real_run_is_shown_whole(finished, tmp_path):
    folder, report = finished
    page, made = page_of(folder, tmp_path)
    rows = read_labels(folder / "labels.parquet")
    assert made.trajectories == len(page.index) == len(page.details) == len(rows) == 12
    for row, entry, detail in zip(rows, page.index, page.details, strict=True):
        assert entry["i"] == row.trajectory.trajectory_id
        assert entry["v"] == [round(v, 4) for v in row.labels.values]
        assert entry["c"] == list(row.evidence.correct)
        assert [s["x"] for s in detail["s"]] == [s.text for s in row.trajectory.steps]
        shown = [o[0] for s in detail["s"] for o in s["o"]]
        assert shown == [o.content for s in row.trajectory.steps for o in s.observations]
    cost = dict(page.summary["cost"])
    assert cost["rollouts"] == f"{report.counts['rollouts']:,}"
    assert cost["rollout tokens"] == f"{report.counts['tokens']:,}"
    assert page.summary["notes"] == []
    assert "rollouts per state: 4" in page.summary["made"]


def test_the_same_folder_gives_the_same_bytes(finished, tmp_path):
    folder, _ = finished
    for name in ("a.html", "b.html"):
        view(ViewConfig(labels=folder, out=tmp_path / name))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_without_a_manifest_the_cost_is_unknown_and_the_page_says_why(tmp_path):
    page, _ = page_of(folder_of(tmp_path / "labels", small_rows()), tmp_path)
    assert dict(page.summary["cost"])["rollout tokens"] == "unknown"
    assert "manifest.json" in page.summary["notes"][0]


def test_trajectories_without_labels_are_mentioned(tmp_path):
    folder = tmp_path / "labels"
    with open_run(folder, kind="label", config={}) as run:
        folder_of(folder, small_rows())
        run.finish({"trajectories_failed": 3, "rollouts": 40, "tokens": 5000})
    page, _ = page_of(folder, tmp_path)
    assert page.summary["notes"][0].startswith("3 trajectories that broken infrastructure ended")


def test_labels_of_a_consensus_are_shown_and_say_what_unknown_means(tmp_path):
    folder = tmp_path / "labels"
    with open_run(folder, kind="consensus", config={}) as run:
        folder_of(folder, small_rows())
        run.finish({"trajectories": 4})
    page, _ = page_of(folder, tmp_path)
    assert len(page.index) == 4
    assert "no verdict" in page.summary["notes"][0]
    assert dict(page.summary["cost"])["rollouts"] == "unknown"


def test_limit_leaves_out_trajectories_and_says_so(tmp_path, capsys):
    folder = folder_of(tmp_path / "labels", small_rows())
    page, report = page_of(folder, tmp_path, limit=3)
    assert (report.trajectories, report.left_out) == (3, 1)
    assert [entry["k"] for entry in page.index] == ["task-2", "task-10", "task-1"]
    assert page.summary["trajectories"] == 4
    assert "--limit left out 1" in page.summary["notes"][0]
    printed = capsys.readouterr().out
    assert "3 trajectories" in printed
    assert "left out by --limit: 1" in printed
    assert f"{report.size / 1e6:.1f} MB" in printed


def test_a_limit_above_the_number_leaves_nothing_out(tmp_path):
    _, report = page_of(folder_of(tmp_path / "labels", small_rows()), tmp_path, limit=99)
    assert (report.trajectories, report.left_out) == (4, 0)


def test_a_folder_without_trajectories_gives_a_page(tmp_path):
    page, report = page_of(folder_of(tmp_path / "labels", []), tmp_path)
    assert report.trajectories == 0
    assert page.index == page.details == []


# --- scores and picture -------------------------------------------------------------------------


def test_scores_stand_beside_the_labels_of_their_trajectory(tmp_path):
    rows = small_rows()
    scores = [make_scores(row.trajectory) for row in reversed(rows[:3])]
    other = replace(scores[0], trajectory_id="of another folder")
    write_jsonl(tmp_path / "scores.jsonl", [*scores, other])
    folder = folder_of(tmp_path / "labels", rows)
    page, _ = page_of(folder, tmp_path, scores=tmp_path / "scores.jsonl")
    assert page.index[0]["p"] == [0.0, 0.25, 0.5, 0.75]
    assert page.index[3]["p"] is None
    facts = dict(page.summary["scores"])
    assert facts["model"] == "c0ffee"
    assert facts["scored"] == "3 of 4"


def test_a_turn_of_several_calls_has_a_score_per_call(tmp_path):
    folder, scores = several_calls(tmp_path)
    page, _ = page_of(folder, tmp_path, scores=tmp_path / "scores.jsonl")
    assert [step["p"] for step in page.details[0]["s"]] == [None, [0.6543, 0.5], None]
    write_jsonl(tmp_path / "scores.jsonl", [replace(scores, calls=())])  # of an older version
    page, _ = page_of(folder, tmp_path, scores=tmp_path / "scores.jsonl")
    assert [step["p"] for step in page.details[0]["s"]] == [None, None, None]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s: [replace(s, calls=((0.25,), (0.1, 0.5), (0.75,)))],
            r"scores for \[1, 2, 1\] calls",
        ),
        (lambda s: [replace(s, values=(0.5,))], "1 scores for trajectory 'task-2/0'.* 4 states"),
        (lambda s: [replace(s, values=(0.5, 0.5, 0.5, 1.5))], "not in \\[0, 1\\]"),
        (lambda s: [s, s], "twice"),
        (lambda s: [replace(s, trajectory_id="x")], "none of the folder's trajectories"),
        (lambda s: [], "none of the folder's trajectories"),
    ],
)
def test_scores_of_other_trajectories_are_refused(tmp_path, change, says):
    rows = small_rows()
    write_jsonl(tmp_path / "scores.jsonl", change(make_scores(rows[0].trajectory)))
    folder = folder_of(tmp_path / "labels", rows)
    with pytest.raises(InputError, match=says):
        page_of(folder, tmp_path, scores=tmp_path / "scores.jsonl")


def test_a_picture_is_carried_by_the_page(tmp_path):
    (tmp_path / "reliability.png").write_bytes(PNG)
    folder = folder_of(tmp_path / "labels", small_rows())
    page, _ = page_of(folder, tmp_path, reliability=tmp_path / "reliability.png")
    assert page.summary["image"].startswith("data:image/png;base64,iVBOR")


@pytest.mark.parametrize(("content", "says"), [(b"<svg/>", "not a PNG"), (None, "cannot read")])
def test_what_is_no_picture_is_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "reliability.png").write_bytes(content)
    folder = folder_of(tmp_path / "labels", small_rows())
    with pytest.raises(InputError, match=says):
        page_of(folder, tmp_path, reliability=tmp_path / "reliability.png")


# --- refusals -----------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist: give the folder that `prm label"):
        page_of(tmp_path / "nothing", tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "labels.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="is a file: give the folder"):
        page_of(tmp_path / "labels.parquet", tmp_path)


def test_a_folder_without_labels_is_refused(tmp_path):
    (tmp_path / "labels").mkdir()
    with pytest.raises(InputError, match=r"holds no labels\.parquet: `prm label"):
        page_of(tmp_path / "labels", tmp_path)


@pytest.mark.parametrize(
    ("kind", "says"), [("train", "kind 'train'"), ("label", "no labels.parquet yet, its run is")]
)
def test_folders_of_other_and_unfinished_runs_are_refused(tmp_path, kind, says):
    with open_run(tmp_path / "run", kind=kind, config={}) as run:
        (run.path / "x").write_text("work")
    assert read_manifest(tmp_path / "run").kind == kind
    with pytest.raises(InputError, match=says):
        page_of(tmp_path / "run", tmp_path)


def test_damaged_labels_are_refused(tmp_path):
    folder = folder_of(tmp_path / "labels", small_rows())
    (folder / "labels.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="not a Parquet file"):
        page_of(folder, tmp_path)


def test_an_output_that_is_no_page_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--out must name an \.html file"):
        ViewConfig(labels=tmp_path, out=tmp_path / "labels.parquet")


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="--limit must be >= 1"):
        ViewConfig(labels=tmp_path, out=tmp_path / "x.html", limit=0)


def test_an_output_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    folder = folder_of(tmp_path / "labels", small_rows())
    (tmp_path / "page.html").mkdir()
    (tmp_path / "file").write_text("")
    for out, says in (("page.html", "is a folder"), ("file/page.html", "cannot write")):
        with pytest.raises(InputError, match=says):
            view(ViewConfig(labels=folder, out=tmp_path / out))
    assert {p.name for p in tmp_path.iterdir()} == {"labels", "page.html", "file"}


def test_the_output_folder_is_made(tmp_path):
    folder = folder_of(tmp_path / "labels", small_rows())
    view(ViewConfig(labels=folder, out=tmp_path / "new" / "page.html"))
    assert Page(tmp_path / "new" / "page.html").index
