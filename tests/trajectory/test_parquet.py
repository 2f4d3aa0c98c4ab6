"""Labels as Parquet: exact round trip, readable by anyone, clear refusals."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import labelled, make_labelled, make_step
from trajectory import parquet
from trajectory.errors import InputError
from trajectory.parquet import label_features, read_labels, write_labels


@settings(max_examples=40)
@given(st.lists(labelled(), max_size=3))
def test_round_trip_is_exact(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("labels") / "labels.parquet"
    assert write_labels(path, rows) == len(rows)
    assert read_labels(path) == rows


def test_rows_of_several_batches_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_BATCH_ROWS", 2)
    rows = [make_labelled(trajectory_id=str(n)) for n in range(5)]
    assert write_labels(tmp_path / "l.parquet", iter(rows)) == 5
    assert read_labels(tmp_path / "l.parquet") == rows


def test_unknown_and_empty_lists_stay_different(tmp_path):
    steps = (make_step(token_ids=(), logprobs=()), make_step(token_ids=None, logprobs=None))
    write_labels(tmp_path / "l.parquet", [make_labelled(2, steps=steps)])
    first, second = read_labels(tmp_path / "l.parquet")[0].trajectory.steps
    assert (first.token_ids, second.token_ids) == ((), None)


def test_lone_surrogates_become_the_replacement_character(tmp_path):
    steps = (make_step(text="a\udcffb\U0001f600"),)
    write_labels(tmp_path / "l.parquet", [make_labelled(1, steps=steps)])
    text = read_labels(tmp_path / "l.parquet")[0].trajectory.steps[0].text
    assert text == "a\ufffdb\U0001f600"


def test_plain_datasets_loads_the_same_columns(tmp_path):
    path = tmp_path / "l.parquet"
    write_labels(path, [make_labelled()])
    data = datasets.load_dataset(
        "parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert data.features == label_features()
    assert data[0]["values"] == [None, 0.75, 0.75]
    assert data[0]["steps"][0]["calls"][0]["name"] == "calculator"
    assert (data[0]["gold_answer"], data[0]["answer"]) == ("3", "3")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "l.parquet"
    write_labels(path, [make_labelled()])

    def broken():
        yield make_labelled(trajectory_id="new")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_labels(path, broken())
    assert read_labels(path) == [make_labelled()]
    assert [p.name for p in tmp_path.iterdir()] == ["l.parquet"]


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(InputError, match="does not exist: `prm label --out DIR` writes"):
        read_labels(tmp_path / "l.parquet")


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "l.parquet"
    path.write_text("not parquet")
    with pytest.raises(InputError, match="is not a Parquet file"):
        read_labels(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(InputError, match="is not a labels file"):
        read_labels(path)


def rewrite(path, change, version="1.0"):
    """Write one good row, then write the file again with its table changed."""
    write_labels(path, [make_labelled()])
    table = pq.read_table(path)
    table = change(table).replace_schema_metadata({b"toolprm.schema_version": version.encode()})
    pq.write_table(table, path)


def test_another_major_version_is_refused(tmp_path):
    path = tmp_path / "l.parquet"
    rewrite(path, lambda table: table, version="2.0")
    with pytest.raises(InputError, match=r"has labels schema 2\.0, this version reads 1\.1"):
        read_labels(path)


def test_another_minor_version_is_read(tmp_path):
    path = tmp_path / "l.parquet"
    rewrite(path, lambda table: table, version="1.7")
    assert read_labels(path) == [make_labelled()]


def test_files_from_before_reuse_was_counted_are_read(tmp_path):
    path = tmp_path / "l.parquet"
    rewrite(path, lambda table: table.drop_columns(["reused"]), version="1.0")
    assert read_labels(path) == [make_labelled()]


def test_unknown_missing_and_mistyped_columns_are_refused(tmp_path):
    path = tmp_path / "l.parquet"
    rewrite(path, lambda table: table.append_column("mood", [["good"]]))
    with pytest.raises(InputError, match="unknown column 'mood'"):
        read_labels(path)
    rewrite(path, lambda table: table.drop_columns(["rollouts"]))
    with pytest.raises(InputError, match="column 'rollouts' is missing"):
        read_labels(path)
    rewrite(path, lambda table: table.drop_columns(["seed"]).append_column("seed", [["7"]]))
    with pytest.raises(InputError, match="column 'seed' has type string, expected int64"):
        read_labels(path)


def test_a_row_that_breaks_an_invariant_is_named(tmp_path):
    path = tmp_path / "l.parquet"
    index = label_features().arrow_schema.get_field_index("outcome")
    rewrite(path, lambda t: t.set_column(index, "outcome", pa.array([7.0])))
    with pytest.raises(InputError, match=r"row 1: .*outcome 7.0 is not in"):
        read_labels(path)


def test_yesterdays_file_still_loads(repository):
    rows = read_labels(repository / "tests" / "golden" / "labels_v1.parquet")
    assert rows == [
        make_labelled(num_steps=3),
        make_labelled(num_steps=1, trajectory_id="bare", meta={}, prompt_ids=None),
    ]
