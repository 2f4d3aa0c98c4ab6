import math
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from prm.data import collate, make_examples, pad
from prm.heads import HEADS
from prm.model import (
    add_lora,
    context_length,
    logits_at,
    merge_lora,
    new_model,
    num_trainable,
    open_config,
    open_tokenizer,
    pick_device,
    quiet_transformers,
)
from tests.prm.synthetic import make_rows, make_tokenizer
from trajectory.errors import InputError


def batch_of(base, head):
    tokenizer = open_tokenizer(base)
    examples = make_examples(make_rows(4), tokenizer)
    pad_id = tokenizer.pad_token_id
    return collate(examples, head.targets, pad_id=pad_id, written=head.is_log_ratio)


@pytest.mark.parametrize("name", sorted(n for n, head in HEADS.items() if not head.words))
@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_training_begins_at_the_base_rate(base, name, rate):
    head = HEADS[name]
    model = new_model(base, head, base_rate=rate, seed=0).eval()
    scores = head.margin(logits_at(model, batch_of(base, head))).sigmoid()
    assert scores.mean().item() == pytest.approx(rate, abs=0.03)
    # A layer begins with small weights; two language models begin equal, to the last bit.
    assert (len(scores.unique()) == 1) == head.is_log_ratio


def test_the_seed_decides_the_head(base):
    weights = [
        new_model(base, HEADS["value"], base_rate=0.5, seed=s).score.weight for s in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_loading_prints_nothing(base, capfd):
    new_model(base, HEADS["value"], base_rate=0.5, seed=0)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_training_mode_has_no_random_mask_before_the_head(base):
    head = HEADS["value"]
    model = new_model(base, head, base_rate=0.5, seed=0).train()
    batch = batch_of(base, head)
    assert torch.equal(logits_at(model, batch), logits_at(model, batch))


def test_merged_lora_scores_equal_the_unmerged_model(base):
    head = HEADS["value"]
    adapted = add_lora(new_model(base, head, base_rate=0.5, seed=0), rank=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # B starts at zero: move everything, as training does
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    batch = batch_of(base, head)
    before = logits_at(adapted.eval(), batch)
    plain = logits_at(new_model(base, head, base_rate=0.5, seed=0).eval(), batch)
    after = logits_at(merge_lora(adapted).eval(), batch)
    assert torch.allclose(before, after, atol=1e-5)
    assert not torch.allclose(before, plain, atol=1e-2)


def test_lora_trains_adapters_and_the_whole_head_only(base):
    model = add_lora(new_model(base, HEADS["value"], base_rate=0.5, seed=0), rank=4, seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or ".score." in n for n in trained)
    assert sum(".score." in n for n in trained) == 2  # weight and bias
    layers = {n.split(".lora_")[0].rsplit(".", 1)[1] for n in trained if "lora_" in n}
    assert layers == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert num_trainable(model) < num_trainable(
        new_model(base, HEADS["value"], base_rate=0.5, seed=0)
    )


def test_an_encoder_works_as_a_base(tmp_path):
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    with quiet_transformers():
        BertForMaskedLM(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    head = HEADS["binary"]
    model = new_model(tmp_path, head, base_rate=0.3, seed=0).eval()
    scores = head.margin(logits_at(model, batch_of(tmp_path, head))).sigmoid()
    assert scores.mean().item() == pytest.approx(0.3, abs=0.05)


def test_padding_does_not_change_logits(base):
    head = HEADS["value"]
    model = new_model(base, head, base_rate=0.5, seed=0).eval()
    tokenizer = open_tokenizer(base)
    examples = make_examples(make_rows(6), tokenizer)
    pad_id = tokenizer.pad_token_id
    together = logits_at(model, collate(examples, head.targets, pad_id=pad_id))
    alone = torch.cat(
        [logits_at(model, collate([e], head.targets, pad_id=pad_id)) for e in examples]
    )
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_missing_padding_token_becomes_the_end_token(base):
    tokenizer = open_tokenizer(base)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"


def test_a_tokenizer_with_neither_is_refused(tmp_path):
    make_tokenizer(end=False).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="neither a padding nor an end token"):
        open_tokenizer(tmp_path)


def test_a_base_without_tokenizer_is_refused(base, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, tmp_path / name)
    with pytest.raises(InputError, match="tokenizer"):
        open_tokenizer(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a model that loads"):
        open_config(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = open_tokenizer(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(5)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="263 tokens but the model embeds only 258"):
        new_model(folder, HEADS["value"], base_rate=0.5, seed=0)


def test_the_context_length_comes_from_the_configuration(base):
    assert context_length(open_config(base)) == 512


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_device_is_refused():
    with pytest.raises(InputError, match="--device cpu"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_pad_and_base_rate_extremes_stay_finite(base):
    model = new_model(base, HEADS["value"], base_rate=1.0, seed=0)
    assert model.score.bias.item() == pytest.approx(math.log(99))
    assert pad([[1], [2, 3]], pad_id=9)[0].tolist() == [[1, 9], [2, 3]]
