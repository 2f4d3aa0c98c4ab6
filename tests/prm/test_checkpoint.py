import errno
import json
import resource

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from prm.checkpoint import (
    is_checkpoint,
    load_checkpoint,
    load_metadata,
    load_tasks,
    save_checkpoint,
    vocabulary_of,
)
from prm.heads import HEADS
from prm.model import new_model, open_tokenizer
from prm.score import Scorer
from tests.prm.synthetic import make_trajectory
from trajectory.errors import InputError


def spoil(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def save_again(folder, *, base, seed=1):
    """Save another model over the one in a folder."""
    save_checkpoint(
        folder,
        model=new_model(base, HEADS["value"], base_rate=0.5, seed=seed),
        tokenizer=open_tokenizer(base),
        metadata=load_metadata(folder),
        tasks=load_tasks(folder),
    )


def test_transformers_alone_loads_it_and_gives_the_same_scores(prm_folder):
    model = AutoModelForTokenClassification.from_pretrained(prm_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(prm_folder)
    trajectory = make_trajectory("+-")
    text = "[task]\nadd it up t0\n"
    for step in trajectory.steps:
        text += f"[action]\n{step.text}\n"
        if step.calls:
            text += f"[observation]\n{step.observations[0].content}\n"
    with torch.inference_mode():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, :, 0]
    scorer = Scorer.load(prm_folder, device="cpu")
    positions = scorer.render([trajectory])[0].positions
    ours = scorer.score([trajectory], calibrated=False)[0].values
    assert logits.sigmoid()[list(positions)].tolist() == pytest.approx(ours, abs=1e-5)


def test_it_records_what_it_is(prm_folder, base, labels):
    metadata = load_metadata(prm_folder)
    assert (metadata.head, metadata.kind, metadata.aggregation) == ("value", "value", "last")
    assert metadata.base_model == str(base)
    assert metadata.vocabulary.size == 258
    assert metadata.provenance.estimators == ("soft",)
    assert metadata.provenance.completers == ("synthetic",)
    assert set(metadata.provenance.parents) == {str(labels / "labels.parquet"), str(base)}
    assert all(len(h) == 64 for h in metadata.provenance.parents.values())
    assert metadata.calibration.fitted
    assert metadata.calibration.ece_before is not None


def test_it_lists_the_tasks_of_both_sides(prm_folder):
    tasks = load_tasks(prm_folder)
    assert set(tasks.train).isdisjoint(tasks.validation)
    assert len(tasks.train) + len(tasks.validation) == 40


def test_saving_again_replaces_the_model_and_keeps_other_files(copied_prm, base):
    folder = copied_prm()
    (folder / "notes.txt").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"stale shard")
    before = load_checkpoint(folder).hash
    save_again(folder, base=base)
    assert load_checkpoint(folder).hash != before
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert not (folder / ".staged").exists()


def test_a_full_disk_leaves_the_old_checkpoint(copied_prm, base, monkeypatch):
    folder = copied_prm()
    before = files_of(folder)

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_again(folder, base=base)
    assert files_of(folder) == before
    assert load_checkpoint(folder)
    assert [p.name for p in folder.iterdir() if p.name.startswith(".stag")] == []


def test_a_write_the_system_refuses_leaves_the_old_checkpoint(copied_prm, base):
    folder = copied_prm()
    before = files_of(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights need more
    try:
        with pytest.raises(Exception, match=r"(?i)too large|os error 27"):
            save_again(folder, base=base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(folder) == before
    assert load_checkpoint(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(tmp_path / "nothing")


def test_a_folder_that_is_no_prm_is_refused(base):
    assert not is_checkpoint(base)
    with pytest.raises(InputError, match=r"not a PRM \(it has no prm.json\)"):
        load_checkpoint(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": "2.0"}, "schema version 2.0, this version reads 1.2"),
        ({"schema_version": None}, "schema version None"),
        ({"rendering": 1}, "rendering 1, this version renders 2"),
        ({"base_log_odds": 0.5}, "head 'value' has no base_log_odds: restore the file"),
        ({"head": "implicit"}, "head 'implicit' needs base_log_odds: restore the file"),
        (
            {"head": "worth"},
            "prm.json: unknown head 'worth'; heads: binary, implicit, ranking, token, value",
        ),
        ({"kind": "correctness"}, "head 'value' is of kind 'value', not 'correctness'"),
        ({"position": "middle"}, "position: Input should be 'observation' or 'action'"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ],
)
def test_metadata_this_version_cannot_read_are_refused(copied_prm, changes, message):
    folder = copied_prm()
    spoil(folder, "prm.json", **changes)
    with pytest.raises(InputError, match=message):
        load_checkpoint(folder)


def test_a_newer_minor_version_is_read(copied_prm):
    folder = copied_prm()
    spoil(folder, "prm.json", schema_version="1.7")
    assert load_checkpoint(folder).metadata.schema_version == "1.7"


def test_broken_json_is_refused(copied_prm):
    folder = copied_prm()
    (folder / "prm.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_checkpoint(folder)


def test_another_vocabulary_is_refused(copied_prm):
    folder = copied_prm()
    tokenizer = open_tokenizer(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"tokenizer .* is not the one .*259 tokens, recorded 258"):
        load_checkpoint(folder)


def test_a_model_smaller_than_the_vocabulary_is_refused(copied_prm):
    folder = copied_prm()
    tokenizer = open_tokenizer(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    vocabulary = vocabulary_of(open_tokenizer(folder)).model_dump()
    spoil(folder, "prm.json", vocabulary=vocabulary)
    with pytest.raises(InputError, match="base vocabulary .* does not match: 259 tokens"):
        load_checkpoint(folder)


def test_weights_that_do_not_belong_to_the_metadata_are_refused(copied_prm):
    folder = copied_prm()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="interrupted save or a changed folder"):
        load_checkpoint(folder)


def test_a_head_with_other_classes_is_refused(copied_prm):
    folder = copied_prm()
    spoil(folder, "prm.json", head="binary", kind="correctness")
    with pytest.raises(InputError, match="has 1 classes, head 'binary' needs 2"):
        load_checkpoint(folder)


def test_the_fingerprint_depends_on_the_ids_too(base):
    tokenizer = open_tokenizer(base)
    pairs = tokenizer.get_vocab()

    class Swapped:
        def get_vocab(self):
            a, b = list(pairs)[:2]
            return pairs | {a: pairs[b], b: pairs[a]}

        def __len__(self):
            return len(tokenizer)

    assert vocabulary_of(tokenizer) == vocabulary_of(open_tokenizer(base))
    assert vocabulary_of(tokenizer) != vocabulary_of(Swapped())
