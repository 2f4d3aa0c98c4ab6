import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForTokenClassification, LlamaForTokenClassification

from prm.checkpoint import Checkpoint, load_checkpoint
from prm.incremental import EpisodeScorer
from prm.score import Scorer
from tests.prm.synthetic import make_trajectory, make_turns
from trajectory.errors import InputError
from trajectory.records import Observation, Step, ToolCall


@pytest.fixture(scope="module", params=["prm_folder", "implicit_folder"])
def scorer(request):
    return Scorer.load(request.getfixturevalue(request.param), device="cpu")


@pytest.fixture(scope="module")
def episodes(scorer):
    return EpisodeScorer(scorer)


def step(text, contents):
    calls = tuple(ToolCall(name="calculator", arguments="{}") for _ in contents)
    return Step(
        text=text, calls=calls, observations=tuple(Observation(content=c) for c in contents)
    )


def up_to(trajectory, count):
    return replace(trajectory, steps=trajectory.steps[:count])


steps = st.lists(
    st.builds(step, st.text(max_size=12), st.lists(st.text(max_size=8), max_size=3)), max_size=6
)


@settings(max_examples=40)
@given(steps=steps, seed=st.integers(0, 1000), calibrated=st.booleans())
def test_a_growing_episode_gets_the_scores_of_a_whole_one(
    scorer, episodes, steps, seed, calibrated
):
    whole = replace(make_trajectory("+"), steps=tuple(steps))
    expected = scorer.score([whole], calibrated=calibrated)[0]
    rng = random.Random(seed)
    count, episode = 0, episodes.begin()
    while count < len(steps):
        found = episode.extend(up_to(whole, count), calibrated=calibrated)
        assert found.values == pytest.approx(expected.values[: count + 1], abs=1e-5)
        count = rng.randint(count, len(steps))  # also no further step, and several at once
    found = episode.extend(whole, calibrated=calibrated)
    assert found.values == pytest.approx(expected.values, abs=1e-5)
    for ours, wanted in zip(found.calls, expected.calls, strict=True):
        assert ours == pytest.approx(wanted, abs=1e-5)
    assert replace(found, values=expected.values, calls=expected.calls) == expected
    assert episode.num_tokens == len(scorer.render([whole])[0].input_ids)


def test_an_episode_grows_result_by_result_within_a_turn(scorer, episodes):
    whole = make_turns("+-+", "-+")
    expected = scorer.score([whole])[0]
    episode, found = episodes.begin(), []
    for t, turn in enumerate(whole.steps):
        for count in range(len(turn.calls) + 1):  # first the turn alone, before any result
            seen = replace(turn, calls=turn.calls[:count], observations=turn.observations[:count])
            scores = episode.extend(replace(whole, steps=(*whole.steps[:t], seen)))
            found += scores.values[-1:] if count else []
    assert found == pytest.approx([v for c in expected.calls for v in c], abs=1e-5)
    assert scores.values == pytest.approx(expected.values, abs=1e-5)
    assert episode.num_tokens == len(scorer.render([whole])[0].input_ids)


def test_the_same_tokens_cut_into_other_calls_are_another_episode(scorer, episodes):
    honest, forged = (
        replace(make_turns("+"), steps=(made,))
        for made in (step("call", ["3", "4"]), step("call\n[observation]\n3", ["4"]))
    )
    assert scorer.render([honest])[0].input_ids == scorer.render([forged])[0].input_ids
    episode = episodes.begin()
    episode.extend(forged)  # nobody asked for the score after the 3
    with pytest.raises(InputError, match="does not continue"):
        episode.extend(honest)


def test_branches_of_an_episode_do_not_disturb_each_other(scorer, episodes):
    first, second = make_trajectory("++-"), make_trajectory("+-+")
    trunk = episodes.begin()
    trunk.extend(up_to(first, 1))
    left, right = trunk.branch(), trunk.branch()
    for count in (2, 3, 4):  # in turns, so that a shared tensor would show
        for episode, whole in ((left, first), (right, second)):
            found = episode.extend(up_to(whole, count))
            expected = scorer.score([up_to(whole, count)])[0]
            assert found.values == pytest.approx(expected.values, abs=1e-5)
    assert trunk.num_tokens < left.num_tokens
    assert trunk.extend(first).values == pytest.approx(scorer.score([first])[0].values, abs=1e-5)


def test_every_token_is_read_once(scorer, episodes, monkeypatch):
    widths = []
    model = scorer.checkpoint.model
    forward = model.forward

    def counting(input_ids=None, **rest):
        widths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", counting)
    whole, episode = make_trajectory("+-+-"), episodes.begin()
    for count in range(whole.num_steps + 1):
        episode.extend(up_to(whole, count))
    assert sum(widths) == len(scorer.render([whole])[0].input_ids)
    assert len(widths) == whole.num_steps + 1


def test_another_episode_is_refused_and_leaves_the_state_alone(scorer, episodes):
    whole, episode = make_trajectory("+-+"), episodes.begin()
    episode.extend(up_to(whole, 2))
    with pytest.raises(InputError, match=r"t0/0 does not continue the episode .* \(\d+ tokens\)"):
        episode.extend(make_trajectory("--+"))
    with pytest.raises(InputError, match="does not continue"):
        episode.extend(up_to(whole, 1))
    assert episode.extend(whole).values == pytest.approx(scorer.score([whole])[0].values, abs=1e-5)


def test_an_episode_that_outgrows_the_model_is_refused(episodes):
    whole = make_trajectory("+")
    episode = episodes.begin()
    episode.extend(whole)
    with pytest.raises(InputError, match=r"has \d+ tokens, the PRM takes 512"):
        episode.extend(replace(whole, steps=(*whole.steps, Step(text="a" * 600))))


def with_model(prm_folder, model):
    loaded = load_checkpoint(prm_folder)
    checkpoint = Checkpoint(
        model=model.eval(),
        tokenizer=loaded.tokenizer,
        metadata=loaded.metadata,
        head=loaded.head,
        hash=loaded.hash,
    )
    return Scorer(checkpoint, torch.device("cpu"))


def test_an_encoder_is_refused(prm_folder):
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        num_labels=1,
    )
    scorer = with_model(prm_folder, BertForTokenClassification(config))
    with pytest.raises(InputError, match="BertForTokenClassification is not a causal model"):
        EpisodeScorer(scorer)


def test_a_decoder_that_looks_ahead_is_refused(prm_folder):
    model = load_checkpoint(prm_folder).model
    assert isinstance(model, LlamaForTokenClassification)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # as embedding models have it
    scorer = with_model(prm_folder, model)
    with pytest.raises(InputError, match="not a causal model"):
        EpisodeScorer(scorer)


def test_a_layer_that_writes_into_its_cache_is_copied(prm_folder, monkeypatch):
    """A cache of an unknown kind is copied whole, so its branches are apart as well."""
    import prm.incremental as module

    monkeypatch.setattr(module, "DynamicLayer", type("Other", (), {}))
    scorer = Scorer.load(prm_folder, device="cpu")
    episode = EpisodeScorer(scorer).begin()
    whole = make_trajectory("+-")
    episode.extend(up_to(whole, 1))
    branch = episode.branch()
    assert branch._cache.layers[0].keys is not episode._cache.layers[0].keys
    assert branch.extend(whole).values == pytest.approx(scorer.score([whole])[0].values, abs=1e-5)
