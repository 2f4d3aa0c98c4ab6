import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import yaml

from prm.calibrate import Calibration
from prm.card import CARD, PublishConfig, describe_calibration, make_card
from prm.evaluate import EvaluateConfig, evaluate
from prm.train import train
from tests.prm.synthetic import make_rows, small_config, write_label_folder
from trajectory.errors import InputError


@pytest.fixture(scope="module")
def evaluated(prm_folder, tmp_path_factory):
    """A reward model with the report of `prm evaluate` in it."""
    root = tmp_path_factory.mktemp("card")
    folder = shutil.copytree(prm_folder, root / "prm")
    labels = write_label_folder(root / "held-out", make_rows(12, prefix="h"))
    evaluate(EvaluateConfig(prm=folder, labels=labels, resamples=100, device="cpu"))
    return folder


def test_the_card_says_what_was_not_measured(prm_folder):
    card = make_card(prm_folder)
    assert "has not been evaluated on other tasks yet: run `prm evaluate`" in card
    assert "has not been attacked yet: run `prm evaluate --attacks`" in card


def test_the_card_holds_data_metrics_with_intervals_and_calibration(evaluated):
    card = make_card(evaluated, repo="someone/prm")
    metadata = json.loads((evaluated / "prm.json").read_text())
    training = metadata["training"]
    assert f"| training | {training['train_trajectories']} | {training['train_tasks']} |" in card
    assert f"{training['held_out_nll']:.4f} nats" in card
    report = json.loads((evaluated / "evaluation/metrics.json").read_text())
    found = report["sections"]["actions"]["prm"]["auroc"]
    shown = f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    assert f"| actions | {report['sections']['actions']['items']} | auroc | {shown} |" in card
    assert describe_calibration(Calibration(**metadata["calibration"])) in card
    assert 'Scorer.load(snapshot_download("someone/prm"))' in card
    assert "On 12 tasks that it was not trained on (24 trajectories)" in card
    assert "beside* a verified outcome" in card


def test_known_attacks_are_listed(evaluated, tmp_path):
    folder = shutil.copytree(evaluated, tmp_path / "prm")
    path = folder / "evaluation/metrics.json"
    rate = {"value": 0.25, "low": 0.1, "high": 0.4, "reason": None}
    body = {"fake_success": {"trajectories": 24, "rate": rate}}
    report = json.loads(path.read_text()) | {"attacks": {"epsilon": 0.05, "by_attack": body}}
    path.write_text(json.dumps(report))
    card = make_card(folder)
    assert "rises by more than 0.05" in card
    assert "| fake success | 24 | 0.250 [0.100, 0.400] |" in card


def test_the_front_matter_is_the_hubs_and_names_no_folder(evaluated):
    card = make_card(evaluated)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["pipeline_tag"] == "token-classification"
    assert "process-reward-model" in front["tags"]
    assert "base_model" not in front  # the base of this one is a folder
    assert str(evaluated.parent.parent) not in card
    assert huggingface_hub.ModelCard(card).data.library_name == "transformers"


def test_a_spoilt_report_is_named(evaluated, tmp_path):
    folder = shutil.copytree(evaluated, tmp_path / "prm")
    (folder / "evaluation/metrics.json").write_text("{")
    with pytest.raises(InputError, match=r"metrics\.json is not JSON"):
        make_card(folder)


def test_an_uncalibrated_model_says_why():
    assert "not calibrated (one class)" in describe_calibration(Calibration(reason="one class"))


def test_a_wrong_repository_or_a_missing_token_is_refused_before_training(
    base, labels, tmp_path, monkeypatch
):
    with pytest.raises(InputError, match="--push-to-hub 'a/b/c'"):
        PublishConfig(push_to_hub="a/b/c")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    publish = PublishConfig(push_to_hub="someone/prm")
    with pytest.raises(InputError, match="needs a token: set HF_TOKEN"):
        train(small_config(base, labels, tmp_path / "prm", publish=publish))
    assert not (tmp_path / "prm").exists()


def test_a_failed_push_is_one_sentence_and_loses_nothing(base, labels, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    config = small_config(base, labels, tmp_path / "prm", epochs=1)
    pushing = replace(config, publish=PublishConfig(push_to_hub="someone/prm"))
    with pytest.raises(InputError, match=r"push to someone/prm failed .* nothing is lost") as ended:
        train(pushing)
    assert "\n" not in str(ended.value)
    weights = (config.out / "model.safetensors").read_bytes()
    assert (config.out / CARD).read_text() == make_card(config.out, repo="someone/prm")
    with pytest.raises(InputError, match="the same command pushes again"):
        train(pushing)  # nothing is trained again, and the finished folder is accepted
    assert train(config) == config.out
    assert (config.out / "model.safetensors").read_bytes() == weights


def test_nothing_new_is_written_without_a_push(prm_folder):
    assert not (prm_folder / CARD).exists()
