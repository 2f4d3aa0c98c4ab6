"""A trained reward model of the implicit head: its folder, its training, and the ways to score."""

import errno
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prm import fit
from prm.card import make_card
from prm.checkpoint import (
    is_checkpoint,
    load_checkpoint,
    load_metadata,
    load_tasks,
    save_checkpoint,
)
from prm.evaluate import EvaluateConfig, evaluate
from prm.heads import HEADS
from prm.incremental import EpisodeScorer
from prm.model import new_model, open_tokenizer
from prm.recipe import RecipeConfig
from prm.remote import RemoteScorer
from prm.score import ScoreConfig, Scorer, score
from prm.train import STATE, train
from tests.prm.loopback import serving
from tests.prm.synthetic import (
    make_rows,
    make_trajectory,
    make_turns,
    small_config,
    write_label_folder,
)
from trajectory.errors import InputError
from trajectory.records import StepScores
from trajectory.run import read_manifest, sha256_of
from trajectory.store import read_jsonl, write_jsonl


def runs():
    marks = ("+", "-", "++-", "", "-+", "+++", "+-")
    return [make_trajectory(m, task=f"s{i}") for i, m in enumerate(marks)]


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_training_lowers_the_held_out_loss_and_tells_right_from_wrong(implicit_folder):
    training = load_metadata(implicit_folder).training
    assert training["held_out_nll"] < 0.8 * training["base_rate_nll"]
    good, bad = Scorer.load(implicit_folder, device="cpu").score(
        [make_trajectory("++", task="new"), make_trajectory("+-", task="new")]
    )
    assert good.values[0] == bad.values[0]
    assert good.values[2] > bad.values[2] + 0.3
    assert (good.kind, good.position) == ("value", "observation")


def test_the_folder_is_a_causal_language_model_with_the_base_below_it(implicit_folder, base):
    metadata = load_metadata(implicit_folder)
    assert (metadata.head, metadata.kind, metadata.aggregation) == ("implicit", "value", "last")
    assert metadata.weights == {
        name: sha256_of(implicit_folder / name)
        for name in ("model.safetensors", "reference/model.safetensors")
    }
    was, policy, reference = (
        AutoModelForCausalLM.from_pretrained(p).state_dict()
        for p in (base, implicit_folder, implicit_folder / "reference")
    )
    assert was.keys() == policy.keys() == reference.keys()
    assert all(torch.equal(was[name], reference[name]) for name in was)
    assert not torch.equal(was["lm_head.weight"], policy["lm_head.weight"])
    assert len(AutoTokenizer.from_pretrained(implicit_folder)) == 258
    rate = metadata.training["base_rate"]
    assert metadata.base_log_odds == pytest.approx(math.log(rate / (1 - rate)))


def test_beta_and_the_constant_come_back_from_the_folder(base, tmp_path, implicit_folder):
    head = replace(HEADS["implicit"], name="implicit:2", beta=2.0)
    save_checkpoint(
        tmp_path / "prm",
        model=new_model(base, head, base_rate=0.2, seed=0),
        tokenizer=open_tokenizer(base),
        metadata=load_metadata(implicit_folder).model_copy(update={"head": "implicit:2"}),
        tasks=load_tasks(implicit_folder),
    )
    loaded = load_checkpoint(tmp_path / "prm")
    assert (loaded.model.beta, loaded.head.beta) == (2.0, 2.0)
    assert loaded.model.base_log_odds == pytest.approx(-1.386294, abs=1e-6)


def save_over(folder, base, head):
    metadata = load_metadata(folder)
    save_checkpoint(
        folder,
        model=new_model(base, HEADS[head], base_rate=0.5, seed=3),
        tokenizer=open_tokenizer(base),
        metadata=metadata.model_copy(update={"head": head}),
        tasks=load_tasks(folder),
    )


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_model_of_either_kind_replaces_one_of_the_other(implicit_folder, base, tmp_path):
    folder = copy_of(implicit_folder, tmp_path)
    (folder / "notes.txt").write_text("mine")
    save_over(folder, base, "value")
    assert load_checkpoint(folder).metadata.base_log_odds is None
    assert not (folder / "reference/model.safetensors").exists()
    save_over(folder, base, "implicit")
    assert load_checkpoint(folder).metadata.base_log_odds == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / ".staged").exists()


def test_a_full_disk_leaves_the_old_model(implicit_folder, base, tmp_path, monkeypatch):
    folder = copy_of(implicit_folder, tmp_path)
    before = files_of(folder)

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_over(folder, base, "implicit")
    assert files_of(folder) == before
    assert load_checkpoint(folder)


def test_a_save_that_stopped_between_the_two_models_is_recognised(
    implicit_folder, base, tmp_path, monkeypatch
):
    folder, moves = copy_of(implicit_folder, tmp_path), []
    move = shutil.os.replace

    def killed(source, target):
        if ".staged/" in str(source):
            moves.append(target)
            if str(target).endswith("reference/config.json"):
                raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr("prm.checkpoint.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        # The reference has the bytes of the old one; the trained model has others.
        save_over(folder, base, "implicit")
    assert len(moves) > 2
    with pytest.raises(InputError, match=r"copy/model.safetensors is not the file prm.json desc"):
        load_checkpoint(folder)
    monkeypatch.setattr("prm.checkpoint.os.replace", move)
    save_over(folder, base, "implicit")
    assert load_checkpoint(folder)
    assert not (folder / ".staged").exists()


def lose(path):
    path.unlink()


def change(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [lose, change])
def test_a_missing_or_changed_reference_is_refused(implicit_folder, tmp_path, spoil):
    folder = copy_of(implicit_folder, tmp_path)
    spoil(folder / "reference/model.safetensors")
    with pytest.raises(InputError, match=r"reference/model.safetensors is not the file prm.json"):
        load_checkpoint(folder)


def test_a_reference_that_does_not_load_is_refused(implicit_folder, tmp_path):
    folder = copy_of(implicit_folder, tmp_path)
    (folder / "reference/config.json").unlink()
    with pytest.raises(InputError, match=r"the weights in .*/reference do not load") as ended:
        load_checkpoint(folder)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("rank", [0, 4])
def test_an_interrupted_run_continues_to_the_same_bytes(base, labels, tmp_path, monkeypatch, rank):
    recipe = RecipeConfig(packing="rows")
    whole = small_config(
        base, labels, tmp_path / "whole", head="implicit", epochs=2, patience=0, lora_rank=rank,
        recipe=recipe,
    )  # fmt: skip
    train(whole)
    parts = replace(whole, out=tmp_path / "parts")
    measured, calls = fit.predict, []

    def interrupt(*args, **options):
        calls.append(1)
        if len(calls) == 2:  # at the end of the second epoch, before it is saved
            raise KeyboardInterrupt
        return measured(*args, **options)

    monkeypatch.setattr(fit, "predict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    assert not is_checkpoint(parts.out)
    state = torch.load(parts.out / STATE / "latest.pt", weights_only=True)
    assert all(name.startswith("policy.") for name in state["weights"])
    monkeypatch.setattr(fit, "predict", measured)
    train(parts)
    for name in ("model.safetensors", "reference/model.safetensors", "prm.json", "tasks.json"):
        assert (parts.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    assert read_manifest(parts.out).status == "finished"


def test_training_packed_gives_the_weights_of_training_padded(base, labels, tmp_path):
    padded = small_config(base, labels, tmp_path / "padded", head="implicit", epochs=1)
    train(padded)
    train(replace(padded, out=tmp_path / "packed", recipe=RecipeConfig(packing="rows")))
    one, two = (load_metadata(tmp_path / n).training for n in ("padded", "packed"))
    assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], abs=1e-4)
    assert one["steps"] == two["steps"]


def test_training_with_shared_prefixes_learns(base, labels, tmp_path):
    config = small_config(
        base, labels, tmp_path / "prm", head="implicit", epochs=4, patience=0,
        recipe=RecipeConfig(packing="prefixes"),
    )  # fmt: skip
    train(config)
    training = load_metadata(config.out).training
    assert training["held_out_nll"] < 0.9 * training["base_rate_nll"]


@pytest.mark.parametrize(("rank", "precision"), [(4, "float32"), (4, "bfloat16"), (0, "bfloat16")])
def test_every_way_to_train_begins_at_the_base_rate_and_learns(
    base, labels, tmp_path, rank, precision, monkeypatch
):
    config = small_config(
        base, labels, tmp_path / "prm", head="implicit", lora_rank=rank, precision=precision,
        learning_rate=1e-2 if rank else 3e-3, epochs=4, patience=0,
    )  # fmt: skip
    first = []
    accumulate = fit.Fitter.accumulate

    def watched(fitter, batches):
        if not first:
            first.extend(fitter.predict(examples).margins_P for examples in [sample])
        return accumulate(fitter, batches)

    fitted = fit.Fitter.fit
    sample = []

    def remember(fitter, train_rows, held_out, log):
        sample.extend(held_out)
        return fitted(fitter, train_rows, held_out, log)

    monkeypatch.setattr(fit.Fitter, "fit", remember)
    monkeypatch.setattr(fit.Fitter, "accumulate", watched)
    train(config)
    assert len(set(first[0])) == 1  # the two models are the same, in the same number format
    for part in ("", "reference"):
        saved = load_file(config.out / part / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
        assert not (config.out / part / "adapter_config.json").exists()
    training = load_metadata(config.out).training
    assert training["held_out_nll"] < 0.95 * training["base_rate_nll"]


def test_scores_do_not_depend_on_padding_or_company(implicit_folder):
    checkpoint = load_checkpoint(implicit_folder)
    together, alone = (
        Scorer(checkpoint, torch.device("cpu"), batch_tokens=n).score(runs()) for n in (4000, 1)
    )
    for one, other in zip(together, alone, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-5)
    assert len({s.values[0] for s in together}) == 1


def test_results_inside_a_turn_move_no_score(implicit_folder):
    """Of two calls in one turn the first has the score of the turn, as `StepScores.calls` says."""
    scorer = Scorer.load(implicit_folder, device="cpu")
    (scores,) = scorer.score([make_turns("+-", "-++", task="several")])
    assert [len(calls) for calls in scores.calls][:2] == [2, 3]
    for calls, value in zip(scores.calls, scores.values[1:], strict=True):
        assert calls == pytest.approx([value] * len(calls), abs=1e-7)
    assert len(set(scores.values)) == len(scores.values)


def test_files_are_scored_and_labels_evaluated(implicit_folder, tmp_path):
    write_jsonl(tmp_path / "trajectories.jsonl", runs())
    out = tmp_path / "scores.jsonl"
    config = ScoreConfig(
        prm=implicit_folder, trajectories=tmp_path / "trajectories.jsonl", out=out, device="cpu"
    )
    assert score(config) == 7
    direct = Scorer.load(implicit_folder, device="cpu").score(runs())
    for ours, wanted in zip(read_jsonl(out, StepScores), direct, strict=True):
        assert ours.values == pytest.approx(wanted.values, abs=1e-6)
    labels = write_label_folder(tmp_path / "labels", make_rows(12, prefix="h"))
    report = evaluate(
        EvaluateConfig(
            prm=implicit_folder, labels=labels, out=tmp_path / "report", resamples=100, device="cpu"
        )
    )
    assert report["sections"]["actions"]["prm"]["auroc"]["value"] > 0.7


def test_a_server_gives_the_scores_of_this_process(implicit_folder):
    scorer = Scorer.load(implicit_folder, device="cpu")
    with serving(scorer) as url:
        remote = RemoteScorer(url, per_request=2)
        for calibrated in (True, False):
            found = remote.score(runs(), calibrated=calibrated)
            for one, other in zip(found, scorer.score(runs(), calibrated=calibrated), strict=True):
                assert one.values == pytest.approx(other.values, abs=1e-5)
                assert one.checkpoint == other.checkpoint


def test_vllm_is_refused_before_any_server_is_asked(implicit_folder):
    with pytest.raises(
        InputError, match=rf"two language models .* with `prm serve --prm {implicit_folder}`"
    ):
        RemoteScorer("http://127.0.0.1:9", prm=implicit_folder)


def test_an_episode_read_token_by_token_keeps_its_sum(implicit_folder, monkeypatch):
    """Between two reads only the predictions of the last token are kept, of both models."""
    scorer = Scorer.load(implicit_folder, device="cpu")
    whole = make_trajectory("+-+")
    (rendered,) = scorer.render([whole])
    episode = EpisodeScorer(scorer).begin()
    found = []
    for t in range(len(rendered.input_ids)):
        columns = [0] if t in rendered.positions else []
        part = replace(rendered, input_ids=rendered.input_ids[: t + 1])
        part = replace(part, written=tuple((b, min(e, t + 1)) for b, e in part.written if b <= t))
        found += episode._forward(part, t, columns).tolist()
    assert found == pytest.approx(scorer.margins([rendered])[0].tolist(), abs=1e-4)


def test_the_card_says_what_it_is(implicit_folder):
    card = make_card(implicit_folder)
    assert "pipeline_tag: text-generation" in card
    assert "a constant plus 0.05 times the log-ratio" in card
    assert "vLLM's pooling runner does\nnot" in card
    assert "ForTokenClassification" not in card
    assert "\n\n\n" not in card.split("## Use")[1].split("## Training data")[0]


def test_the_json_beside_it_is_read_by_people_too(implicit_folder):
    written = json.loads((implicit_folder / "prm.json").read_text())
    assert (written["schema_version"], written["head"]) == ("1.2", "implicit")
