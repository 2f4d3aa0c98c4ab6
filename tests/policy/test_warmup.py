import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent.chat import CHATML_TEMPLATE
from policy.synthesize import SynthesizeConfig, synthesize
from policy.tiny import CHAT_TEMPLATE, make_model, make_tokenizer
from policy.warmup import WarmupConfig, warmup
from trajectory.errors import InputError
from trajectory.records import StopReason, Trajectory
from trajectory.run import read_manifest
from trajectory.store import read_jsonl, write_jsonl
from trajectory.tracking import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("data") / "out"
    synthesize(SynthesizeConfig(tasks="arithmetic", num_tasks=24, slip=0.0, out=out))
    return out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a hub would hold it, published in bfloat16."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=3).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_for(data: Path, out: Path, **settings: object) -> WarmupConfig:
    defaults = {"model": "tiny", "device": "cpu", "step_tokens": 1024, "epochs": 1}
    return WarmupConfig(data=data, out=out, **(defaults | settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def largest_difference(one: Path, two: Path) -> float:
    left, right = weights(one), weights(two)
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)


def test_a_policy_from_scratch_learns_and_is_an_ordinary_folder(data, tmp_path):
    out = tmp_path / "out"
    warmup(config_for(data, out, epochs=8, step_tokens=512, track="jsonl"))
    curve = [entry.metrics for entry in read_metrics(out)]
    assert curve[-1]["loss"] < 0.5 * curve[0]["loss"]
    held_out = [entry["held_out_loss"] for entry in curve if "held_out_loss" in entry]
    assert len(held_out) == 8
    assert held_out[-1] < held_out[0]
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    manifest = read_manifest(out)
    assert manifest.counts["trajectories"] == 24
    assert manifest.counts["held_out"] == 1
    assert manifest.counts["steps"] == len(curve)
    assert not (out / "checkpoints").exists()


def test_the_result_does_not_depend_on_the_micro_batches(data, tmp_path):
    for name, micro in (("a", 100), ("b", 4096)):
        warmup(config_for(data, tmp_path / name, batch_tokens=micro))
    assert largest_difference(tmp_path / "a", tmp_path / "b") < 1e-4


def test_bfloat16_passes_learn_nearly_the_same_in_float32_weights(data, tmp_path):
    curves = {}
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        warmup(config_for(data, out, precision=precision, track="jsonl", step_tokens=512))
        curves[precision] = [entry.metrics["loss"] for entry in read_metrics(out)]
        assert {tensor.dtype for tensor in weights(out).values()} == {torch.float32}
    assert curves["bfloat16"] != curves["float32"]
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.02)


def interrupt_when(metrics: Path, lines: int) -> threading.Thread:
    """Press Ctrl-C once so many steps are recorded."""

    def watch() -> None:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_an_interrupted_run_continues_to_the_same_weights(data, tmp_path):
    settings = {"epochs": 5, "step_tokens": 512, "track": "jsonl"}
    warmup(config_for(data, tmp_path / "whole", **settings))
    part = tmp_path / "part"
    watcher = interrupt_when(part / "metrics.jsonl", 3)
    with pytest.raises(KeyboardInterrupt):
        warmup(config_for(data, part, **settings))
    watcher.join()
    assert read_manifest(part).status == "interrupted"
    assert not (part / "model.safetensors").exists()
    (checkpoint,) = (part / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) >= 3
    warmup(config_for(data, part, **settings))
    assert read_manifest(part).starts == 2
    assert largest_difference(tmp_path / "whole", part) == 0
    assert len(read_metrics(part)) == len(read_metrics(tmp_path / "whole"))


def test_a_finished_run_is_left_as_it_is(data, tmp_path):
    config = config_for(data, tmp_path / "out")
    warmup(config)
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    warmup(config)
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    manifest = read_manifest(tmp_path / "out")
    assert manifest.status == "finished"
    assert manifest.counts["trajectories"] == 24


def test_a_folder_of_another_run_is_refused(data, tmp_path):
    warmup(config_for(data, tmp_path / "out"))
    with pytest.raises(InputError, match="seed was 0, now 1"):
        warmup(config_for(data, tmp_path / "out", seed=1))


def test_full_fine_tuning_keeps_the_published_precision(data, pretrained, tmp_path):
    warmup(config_for(data, tmp_path / "out", model=str(pretrained), learning_rate=1e-3))
    tuned = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in tuned.values()} == {torch.bfloat16}
    assert largest_difference(tmp_path / "out", pretrained) > 1e-3


def test_adapters_are_merged_into_a_plain_folder(data, pretrained, tmp_path):
    out = tmp_path / "out"
    warmup(config_for(data, out, model=str(pretrained), lora_rank=4, learning_rate=1e-2))
    assert weights(out).keys() == weights(pretrained).keys()
    assert not list(out.glob("adapter*"))
    assert largest_difference(out, pretrained) > 1e-3
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(weights(out)[embeddings], weights(pretrained)[embeddings])


def test_the_policy_carries_the_format_it_was_trained_with(data, pretrained, tmp_path):
    out = tmp_path / "out"
    warmup(config_for(data, out, model=str(pretrained), chat_format="chatml"))
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML_TEMPLATE


def test_trajectories_cut_off_by_a_limit_are_left_out_and_counted(data, tmp_path):
    trajectories = list(read_jsonl(data / "trajectories.jsonl", Trajectory))
    cut = replace(trajectories[0], stop=StopReason.MAX_STEPS, outcome=None, answer=None)
    write_jsonl(tmp_path / "some.jsonl", [cut, *trajectories[1:]])
    warmup(config_for(tmp_path / "some.jsonl", tmp_path / "out"))
    assert read_manifest(tmp_path / "out").counts["dropped_unjudged"] == 1


def test_long_trajectories_are_an_error_or_counted(data, tmp_path):
    with pytest.raises(InputError, match="exceed --max-length 110"):
        warmup(config_for(data, tmp_path / "out", max_length=110))
    assert not (tmp_path / "out").exists()
    warmup(config_for(data, tmp_path / "out", max_length=110, on_long="drop"))
    assert read_manifest(tmp_path / "out").counts["dropped_long"] > 0


def test_different_tools_are_refused(data, tmp_path):
    trajectories = list(read_jsonl(data / "trajectories.jsonl", Trajectory))
    mixed = [replace(trajectories[0], tools=("python",)), *trajectories[1:]]
    write_jsonl(tmp_path / "mixed.jsonl", mixed)
    with pytest.raises(InputError, match="different tools"):
        warmup(config_for(tmp_path / "mixed.jsonl", tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": Path("nowhere")}, "nowhere"),
        ({"model": "."}, "no tokenizer could be loaded"),
        ({"lora_rank": 4}, "tiny starts from scratch"),
        ({"chat_format": "chatml"}, "tiny brings its own"),
        ({"epochs": 0}, "--epochs must be >= 1"),
        ({"held_out": 1.0}, "--held-out must be in"),
        ({"learning_rate": -1.0}, "--learning-rate must be > 0"),
    ],
)
def test_bad_settings_are_refused(data, tmp_path, monkeypatch, settings, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    settings = {"data": data, **settings}
    with pytest.raises(InputError, match=message):
        warmup(config_for(out=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()
