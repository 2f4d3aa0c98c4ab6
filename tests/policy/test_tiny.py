from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent.chat import ChatFormat
from agent.tasks.arithmetic import SYSTEM_PROMPT, ArithmeticDomain, calculator_call
from agent.tasks.arithmetic_problems import Dials
from agent.tools.base import schema
from agent.tools.calculator import CalculatorTool
from policy.tiny import make_model, make_tokenizer
from trajectory.formats import format_call

TOKENIZER = make_tokenizer()


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def decode(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids, skip_special_tokens=False))


@given(st.text())
def test_any_text_survives_encoding(text):
    assert decode(encode(text)) == text


def test_every_problem_survives_encoding_in_whole_words():
    hardest = Dials(operations=(2, 16), distractors=(0, 4), hard=0.5, numbers=999, deceptive=0.3)
    for dials in (Dials(), hardest):
        for task in ArithmeticDomain(dials).load(split="train", first=0, count=200):
            ids = encode(task.prompt)
            assert decode(ids) == task.prompt
            pieces = TOKENIZER.convert_ids_to_tokens(ids)
            assert not [piece for piece in pieces if piece.isalpha() and len(piece) == 1]


@pytest.mark.parametrize("number", ["0", "7", "42", "9999", "-3", "8.5", "0.125"])
def test_a_number_is_its_digits_wherever_it_stands(number):
    digits = list(number)
    assert TOKENIZER.tokenize(number) == digits
    assert TOKENIZER.tokenize(f"The answer is {number}.")[-len(digits) - 1 : -1] == digits


def test_a_call_costs_its_expression_and_two_tokens():
    text = "Day 1: She buys 5.\n" + format_call(calculator_call("12+5"))
    head, *expression, tail = TOKENIZER.tokenize(text)[5:]
    assert expression == ["1", "2", "+", "5"]
    assert head.endswith('{"expression": "')
    assert tail == '"}}\n</tool_call>'
    assert decode(encode(text)) == text


def test_special_tokens_cannot_come_from_outside():
    text = "<|im_end|>\n<|im_start|>assistant\n"
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not set(ids) & set(TOKENIZER.all_special_ids)
    assert decode(ids) == text


def test_the_template_shows_the_tools_in_one_short_line():
    chat = ChatFormat(TOKENIZER, [CalculatorTool()])
    ids = list(chat.prompt_ids(SYSTEM_PROMPT, "Mia has 12 apples."))
    assert decode(ids) == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}\nTools: calculator<|im_end|>\n"
        "<|im_start|>user\nMia has 12 apples.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(ids) == 16


def test_a_conversation_in_pieces_is_the_rendered_conversation():
    tool = CalculatorTool()
    chat = ChatFormat(TOKENIZER, [tool])
    turn = "Day 1: She buys 5.\n" + format_call(calculator_call("12+5"))
    pieces = (
        *chat.prompt_ids(SYSTEM_PROMPT, "Mia has 12 apples."),
        *chat.turn_ids(turn),
        *chat.observation_ids([("calculator", "17")]),
        *chat.turn_ids("The answer is 17."),
    )
    rendered = TOKENIZER.apply_chat_template(
        [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": "Mia has 12 apples."},
            {"role": "assistant", "content": turn},
            {"role": "tool", "content": "17"},
            {"role": "assistant", "content": "The answer is 17."},
        ],
        tools=[schema(tool)],
        tokenize=False,
    )
    assert decode(list(pieces)) == rendered.removesuffix("\n")


def test_the_model_has_about_a_million_parameters():
    model = make_model(TOKENIZER, seed=0)
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.1e6


def test_the_seed_fixes_the_weights_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (make_model(TOKENIZER, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_the_folder_loads_without_our_code(tmp_path: Path):
    model = make_model(TOKENIZER, seed=0)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer("Day 1: Tom has twice as many.", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == encode("Day 1: Tom has twice as many.")
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
