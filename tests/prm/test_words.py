import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from prm.heads import get_head
from prm.model import new_model, open_tokenizer, quiet_transformers
from prm.score import Scorer
from prm.train import train
from tests.prm.synthetic import make_tokenizer, make_trajectory, small_config
from trajectory.errors import InputError


@pytest.mark.parametrize("words", ["-,+", "n,y"])
def test_the_initial_scores_are_the_bases_own_token_probabilities(base, words):
    head, tokenizer = get_head(f"token:{words}"), open_tokenizer(base)
    model = new_model(base, head, base_rate=0.9, seed=0).eval()
    lm = AutoModelForCausalLM.from_pretrained(base).eval()
    wrong, right = (tokenizer.convert_tokens_to_ids(w) for w in words.split(","))
    ids_BT = torch.tensor([tokenizer("[task]\nadd it up\n")["input_ids"]])
    with torch.no_grad():
        probabilities = lm(input_ids=ids_BT).logits.softmax(-1)
        scores = head.margin(model(input_ids=ids_BT).logits).sigmoid()
    pair = probabilities[..., [wrong, right]]
    assert torch.allclose(scores, pair[..., 1] / pair.sum(-1), atol=1e-6)
    assert scores.std() > 0


def test_a_token_model_learns_scores_and_keeps_its_words(base, labels, tmp_path):
    config = small_config(base, labels, tmp_path / "prm", head="token:n,y", epochs=6, patience=0)
    train(config)
    scorer = Scorer.load(config.out, device="cpu")
    assert scorer.metadata.head == "token:n,y"
    good, bad = scorer.score([make_trajectory("++", task="new"), make_trajectory("--", task="new")])
    assert good.values[2] > bad.values[2] + 0.3


def test_words_of_several_tokens_are_refused(base):
    with pytest.raises(InputError, match=r"'good' is 4 of this base: name two others with --head"):
        new_model(base, get_head("token:bad,good".replace("bad", "b")), base_rate=0.5, seed=0)


@pytest.mark.parametrize("name", ["token:", "token:a", "token:a,a", "token:a,", "token:a,b,c"])
def test_anything_but_two_words_is_refused(name):
    with pytest.raises(InputError, match="give two different words"):
        get_head(name)


def saved(folder, network):
    with quiet_transformers():
        network.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


def test_a_base_that_caps_its_token_scores_is_refused(tmp_path):
    config = Gemma2Config(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.5,  # scores of a size that the cap bends
    )
    folder = saved(tmp_path, Gemma2ForCausalLM(config))
    with pytest.raises(InputError, match="not a linear layer of its last hidden state"):
        new_model(folder, get_head("token"), base_rate=0.5, seed=0)


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    folder = saved(tmp_path, BertForMaskedLM(config))
    with pytest.raises(InputError, match="cannot start a token head.*--head binary"):
        new_model(folder, get_head("token"), base_rate=0.5, seed=0)
