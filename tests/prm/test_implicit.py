"""The network of the implicit head: the sum, what it counts, and which bases it takes."""

import math
import shutil
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from prm.data import Example, collate, make_examples
from prm.heads import HEADS, get_head
from prm.implicit import ImplicitModel, log_probs_of, plain_network, running_sums
from prm.model import add_lora, logits_at, merge_lora, new_model, open_tokenizer, quiet_transformers
from prm.packing import check_packing, collate_packed
from prm.prefix_tree import check_prefix_sharing, collate_tree
from prm.recipe import RecipeConfig
from prm.train import TrainConfig, train
from prm.training_data import PublicData
from tests.prm.synthetic import label_row, make_rows, make_tokenizer, make_trajectory
from trajectory.errors import InputError

HEAD = HEADS["implicit"]


class Bigram(torch.nn.Module):
    """A language model whose log-odds of every next token stand in a table, row by last token."""

    def __init__(self, table):
        super().__init__()
        self.table_VV = torch.nn.Parameter(torch.tensor(table))

    def forward(self, input_ids, logits_to_keep, **_):  # what is before the last token is no matter
        return SimpleNamespace(logits=self.table_VV[input_ids[:, logits_to_keep]])


def pair_of(policy, reference, *, beta=0.5, base_log_odds=-1.0):
    return ImplicitModel(
        policy=Bigram(policy), reference=Bigram(reference), beta=beta, base_log_odds=base_log_odds
    )


# Two tokens. After 0 the policy gives 1 with 0.8, after 1 with 0.4; the reference always 0.5.
POLICY = [[math.log(0.2), math.log(0.8)], [math.log(0.6), math.log(0.4)]]
REFERENCE = [[0.0, 0.0], [0.0, 0.0]]


def test_the_logits_of_a_hand_computed_example():
    pair = pair_of(POLICY, REFERENCE)
    ids_BT = torch.tensor([[0, 1, 1, 0, 0]])
    written_BT = torch.tensor([[False, True, False, True, True]])
    found = pair(ids_BT, written=written_BT).logits
    assert found.shape == (1, 5, 1)
    # After the task -1. Token 1 after 0: ln(0.8/0.5) = 0.4700; token 2 is an observation;
    # token 0 after 1: ln(0.6/0.5) = 0.1823; token 0 after 0: ln(0.2/0.5) = -0.9163.
    wanted = [-1.0, -0.7650, -0.7650, -0.6738, -1.1320]
    assert found[0, :, 0].tolist() == pytest.approx(wanted, abs=1e-4)


def example_of(ids, positions, written, *, rollouts, correct):
    return Example(
        input_ids=ids,
        positions=positions,
        rollouts=rollouts,
        correct=correct,
        values=(None,) * len(positions),
        task_id="t",
        trajectory_id="t/0",
        written=written,
    )


def test_with_the_outcome_alone_the_loss_is_the_papers_cross_entropy():
    pair = pair_of(POLICY, REFERENCE, base_log_odds=0.0)
    for outcome, wanted in ((1, 0.7613), (0, 0.6293)):
        row = example_of(
            (0, 1, 1, 0, 0),
            (0, 2, 4),
            ((1, 2), (3, 5)),
            rollouts=(0, 0, 1),
            correct=(0, 0, outcome),
        )
        batch = collate([row], HEAD.targets, pad_id=0, written=True)
        loss = HEAD.loss(logits_at(pair, batch), batch)
        # r = 0.5 (0.4700 + 0.1823 - 0.9163) = -0.1320; -ln sigmoid(r) and -ln sigmoid(-r).
        assert loss.item() == pytest.approx(wanted, abs=1e-4)


def test_counts_at_every_prefix_weigh_by_their_rollouts():
    pair = pair_of(POLICY, REFERENCE, base_log_odds=0.0)
    row = example_of(
        (0, 1, 1, 0, 0), (0, 2, 4), ((1, 2), (3, 5)), rollouts=(4, 0, 2), correct=(1, 0, 2)
    )
    batch = collate([row], HEAD.targets, pad_id=0, written=True)
    # 4 ln 2 at the logit 0, and 2 * 0.7613 of the example above.
    assert HEAD.loss(logits_at(pair, batch), batch).item() == pytest.approx(4.2952, abs=1e-4)


rows_of_tokens = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=12),
    min_size=1,
    max_size=5,
)
tables = st.lists(st.lists(st.floats(-3, 3), min_size=3, max_size=3), min_size=3, max_size=3)


@settings(max_examples=60)
@given(rows=rows_of_tokens, policy=tables, reference=tables, beta=st.floats(0.01, 2))
def test_every_logit_is_the_sum_over_the_written_tokens_before_it(rows, policy, reference, beta):
    def spans(row):
        return tuple((t, t + 1) for t, (_, mine) in enumerate(row) if mine and t)

    examples = [
        example_of(
            tuple(token for token, _ in row),
            tuple(range(len(row))),
            spans(row),
            rollouts=(1,) * len(row),
            correct=(1,) * len(row),
        )
        for row in rows
    ]
    pair = pair_of(policy, reference, beta=beta, base_log_odds=0.3)
    logs = [torch.tensor(t).double().log_softmax(-1) for t in (policy, reference)]
    wanted = []
    for row, example in zip(rows, examples, strict=True):
        total, counted = 0.3, {begin for begin, _ in example.written}
        for t, (token, _) in enumerate(row):
            if t in counted:
                before = row[t - 1][0]
                total += beta * float(logs[0][before, token] - logs[1][before, token])
            wanted.append(total)
    for gather in (collate, collate_packed, collate_tree):
        batch = gather(examples, HEAD.targets, pad_id=0, written=True)
        assert logits_at(pair, batch)[:, 0].tolist() == pytest.approx(wanted, abs=1e-4)


@given(
    rows=st.lists(
        st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), min_size=1, max_size=6
    )
)
def test_packed_sums_are_those_of_rows_by_themselves(rows):
    packed = torch.tensor([[v for row in rows for v in row]])
    parents, wanted = [], []
    for row in rows:
        start = len(parents)
        parents += [-1, *range(start, start + len(row) - 1)]
        alone = torch.tensor([[-1, *range(len(row) - 1)]])
        wanted += running_sums(torch.tensor([row]), alone)[0].tolist()
        assert wanted[start:] == pytest.approx(list(accumulate(row)), abs=1e-9)
    # To the last bit: what is packed beside a row plays no part at all.
    assert running_sums(packed, torch.tensor([parents]))[0].tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_in_float32_of_logits_of_any_format(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (9 * torch.randn(2, 3, 40, generator=generator)).to(dtype)
    ids = torch.randint(40, (2, 3), generator=generator)
    wanted = logits.double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    found = log_probs_of(logits, ids, torch.arange(3))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), wanted, atol=1e-5)


@torch.no_grad()
def moved(pair):
    """The pair after something like training."""
    generator = torch.Generator().manual_seed(1)
    for parameter in pair.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return pair


def examples_of(base):
    marks = ["+-+", "", "-", "++", "+", ""]
    rows = [label_row(make_trajectory(m, task=f"t{i}"), m) for i, m in enumerate(marks)]
    return make_examples(rows, open_tokenizer(base))


def test_rows_packed_padded_and_alone_have_the_same_logits_and_gradients(base):
    examples = examples_of(base)
    batches = [
        [collate(examples, HEAD.targets, pad_id=0, written=True)],
        [collate_packed(examples, HEAD.targets, pad_id=0, written=True)],
        [collate_tree(examples, HEAD.targets, pad_id=0, written=True)],
        [collate([e], HEAD.targets, pad_id=0, written=True) for e in examples],
    ]
    found = []
    for split in batches:
        pair = moved(new_model(base, HEAD, base_rate=0.3, seed=0))
        logits = [logits_at(pair, batch) for batch in split]
        weight = sum(batch.weights_P.sum() for batch in split)
        parts = [HEAD.loss(z, b) / weight for z, b in zip(logits, split, strict=True)]
        sum(parts).backward()
        found.append((torch.cat(logits), [p.grad for p in pair.policy.parameters()]))
        assert all(p.grad is None for p in pair.reference.parameters())
    assert found[0][0].std() > 0.1
    for logits, gradients in found[1:]:
        assert torch.allclose(logits, found[0][0], atol=1e-5)
        for one, other in zip(gradients, found[0][1], strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_observations_and_tasks_are_read_but_move_nothing(base):
    pair = moved(new_model(base, HEAD, base_rate=0.3, seed=0))
    tokenizer = open_tokenizer(base)
    rows = make_rows(6)
    after, before = (make_examples(rows, tokenizer, position=p) for p in ("observation", "action"))
    with torch.no_grad():
        one, two = (
            logits_at(pair, collate(e, HEAD.targets, pad_id=0, written=True))[:, 0]
            for e in (after, before)
        )
    assert torch.equal(one, two)
    starts = [i for e in after for i in (True, *(False,) * (len(e.positions) - 1))]
    constant = math.log(0.3 / 0.7)
    assert one[starts].tolist() == pytest.approx([constant] * len(rows), abs=1e-6)
    steps = one[[not s for s in starts]]
    assert (steps - constant).abs().min() > 1e-4
    good, bad = make_trajectory("+"), make_trajectory("-")
    swapped = type(good)(
        trajectory_id=good.trajectory_id, task=good.task, stop=good.stop, answer="3", outcome=1.0,
        steps=(
            type(good.steps[0])(
                text=good.steps[0].text, calls=good.steps[0].calls,
                observations=bad.steps[0].observations,
            ),
            good.steps[1],
        ),
    )  # fmt: skip
    examples = make_examples([label_row(t, "+") for t in (good, swapped)], tokenizer)
    with torch.no_grad():
        logits_P = logits_at(pair, collate(examples, HEAD.targets, pad_id=0, written=True))[:, 0]
    assert abs(logits_P[1] - logits_P[4]) < 1e-6  # the result itself says nothing,
    assert abs(logits_P[2] - logits_P[5]) > 1e-4  # but the next action is read in its light


def test_a_batch_in_which_nothing_is_written_has_gradients_of_zero(base):
    pair = new_model(base, HEAD, base_rate=0.3, seed=0)
    row = example_of((1, 2, 3), (2,), (), rollouts=(4,), correct=(1,))
    batch = collate([row], HEAD.targets, pad_id=0, written=True)
    HEAD.loss(logits_at(pair, batch), batch).backward()
    assert all(not p.grad.any() for p in pair.policy.parameters())


def test_rows_that_do_not_know_who_wrote_them_are_refused():
    row = example_of((1, 2, 3), (2,), None, rollouts=(4,), correct=(1,))
    for gather in (collate, collate_packed, collate_tree):
        with pytest.raises(InputError, match="which tokens of a row the agent wrote is not known"):
            gather([row], HEAD.targets, pad_id=0, written=True)


@pytest.mark.parametrize("part", [(0, 2), (1, 4), (2, 1)])
def test_parts_outside_a_row_or_on_its_first_token_are_refused(part):
    row = example_of((1, 2, 3), (2,), (part,), rollouts=(4,), correct=(1,))
    with pytest.raises(InputError, match=f"a row of 3 tokens .* from token {part[0]} to {part[1]}"):
        collate([row], HEAD.targets, pad_id=0, written=True)


def test_both_models_stay_without_dropout_and_the_reference_without_gradients(base):
    pair = new_model(base, HEAD, base_rate=0.3, seed=0).train()
    assert not any(module.training for module in pair.modules())
    assert {n.split(".")[0] for n, p in pair.named_parameters() if p.requires_grad} == {"policy"}


def test_merged_adapters_score_as_before_and_only_they_are_trained(base):
    pair = add_lora(new_model(base, HEAD, base_rate=0.3, seed=0), rank=4, seed=0)
    assert all("lora_" in n for n, p in pair.named_parameters() if p.requires_grad)
    assert not any(module.training for module in pair.modules())
    batch = collate(examples_of(base), HEAD.targets, pad_id=0, written=True)
    with torch.no_grad():
        assert len(logits_at(pair, batch).unique()) == 1
        before = logits_at(moved(pair), batch)
        merged = merge_lora(pair)
        after = logits_at(merged, batch)
    assert before.std() > 0.01
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_that_a_base_shares_can_be_shared_again(base, rank):
    pair = new_model(base, HEAD, base_rate=0.3, seed=0)
    pair = add_lora(pair, rank=rank, seed=0) if rank else pair

    def shared(model):
        return model.get_input_embeddings().weight is model.get_output_embeddings().weight

    pair.to("meta")  # as accelerate does before it shards
    assert not shared(pair.policy)
    pair.tie_weights()
    assert shared(pair.policy)
    assert shared(pair.reference)


def test_packing_is_tried_on_a_base_whose_two_copies_do_not_differ_yet(base, monkeypatch):
    pair = new_model(base, HEAD, base_rate=0.3, seed=0)
    check_packing(plain_network(pair), vocabulary=250)
    check_prefix_sharing(plain_network(pair), vocabulary=250)
    forward = pair.reference.forward
    monkeypatch.setattr(  # a base that does not look at position ids
        pair.reference, "forward", lambda position_ids=None, **rest: forward(**rest)
    )
    with pytest.raises(InputError, match="packed rows would see each other"):
        check_packing(plain_network(pair), vocabulary=250)


def test_beta_is_named_with_the_head():
    assert (get_head("implicit:0.25").beta, get_head("implicit:0.25").name) == (
        0.25,
        "implicit:0.25",
    )
    for name in ("implicit:", "implicit:x", "implicit:0", "implicit:-1", "implicit:inf"):
        with pytest.raises(InputError, match=f"head '{name}': give a positive number"):
            get_head(name)


def saved(folder, network):
    with quiet_transformers():
        network.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


SIZES = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_an_encoder_is_refused(tmp_path):
    folder = saved(tmp_path, BertForMaskedLM(BertConfig(intermediate_size=64, **SIZES)))
    with pytest.raises(InputError, match="cannot start the implicit head: BertLMHeadModel is no"):
        new_model(folder, HEAD, base_rate=0.5, seed=0)


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=258, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    folder = saved(tmp_path, T5ForConditionalGeneration(config))
    with pytest.raises(InputError, match="it is no causal language model; use --head value"):
        new_model(folder, HEAD, base_rate=0.5, seed=0)


def test_a_base_without_a_language_model_head_is_refused(tmp_path):
    folder = saved(tmp_path, LlamaModel(LlamaConfig(intermediate_size=64, **SIZES)))
    with pytest.raises(InputError, match="lacks weights of a language model, such as lm_head"):
        new_model(folder, HEAD, base_rate=0.5, seed=0)


def test_a_tokenizer_larger_than_the_embedding_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = open_tokenizer(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="259 tokens but the model embeds only 258"):
        new_model(folder, HEAD, base_rate=0.5, seed=0)


def test_sampling_settings_that_no_longer_pass_do_not_stop_a_save(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    pair = new_model(folder, HEAD, base_rate=0.5, seed=0)
    with quiet_transformers():
        pair.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "reference")
    assert torch.equal(again.lm_head.weight, pair.reference.lm_head.weight)


def test_a_first_stage_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match=r"--head-first: head 'implicit:1' has no classification"):
        TrainConfig(
            labels=tmp_path, model="none", out=tmp_path / "prm", head="implicit:1",
            recipe=RecipeConfig(head_first=1),
        )  # fmt: skip


def test_labels_without_counts_are_refused_with_the_head_that_takes_them(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "completions": ["a", "b"], "labels": [true, false]}\n' * 4)
    with pytest.raises(InputError, match="head 'implicit' needs counts or outcomes; use --head bi"):
        train(
            TrainConfig(
                public=PublicData(data=f"trl:{path}"), model=str(base), out=tmp_path / "prm",
                head="implicit", device="cpu",
            )
        )  # fmt: skip
