"""The embedded policy: a Llama-architecture model of about 0.8 million parameters.

Its tokenizer works on digits and on the whole words of the arithmetic laboratory; any other text
falls back to characters and bytes, so every text survives encoding. A tool call costs one token for
its JSON head and one for its tail but decodes to the ordinary format. The result is an ordinary
Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agent.tasks.arithmetic import SYSTEM_PROMPT, calculator_call
from agent.tasks.arithmetic_problems import wording
from trajectory.formats import format_call

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
_HEADERS = tuple(f"<|im_start|>{role}\n" for role in ("system", "user", "assistant", "tool"))
CONTROL_TOKENS = (
    END_OF_TEXT,
    PADDING,
    "<|im_start|>",
    END_OF_TURN,
    *_HEADERS,
    *(f"\n{header}" for header in _HEADERS),
)
"""Special tokens: text from outside can never produce them."""
RENDERING_TOKENS = ("[task]\n", "[action]\n", "[observation]\n")
"""Headers of the rendering that process reward models read."""
# A word takes the space before it, and the one behind it if a number follows, so that digits are
# the same tokens everywhere and no space needs a token of its own. The label of a day is one.
_WORDS = r" ?Day [0-9]+:| ?[A-Za-z]+ (?=[0-9])| ?[A-Za-z]+|[0-9]|[\s\S]"

CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{%- if system or tools %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
{{- '\\nTools:' }}{%- for tool in tools %}{{- ' ' + tool.function.name }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""ChatML with one line that names the tools: the model learns their use from demonstrations."""


def _call_tokens() -> tuple[str, ...]:
    """Return head and tail of a calculator call, with and without the tags."""
    marker = "PLACEHOLDER"
    head, tail = format_call(calculator_call(marker)).split(marker)
    open_tag, inner_head = head.split("\n", 1)
    inner_tail, close_tag = tail.rsplit("\n", 1)
    return (open_tag, close_tag, inner_head, inner_tail, f"\n{head}", tail)


def _texts() -> Iterator[str]:
    """Yield every text whose words become tokens."""
    yield from wording()
    yield "The answer is 7."
    yield "Wait."
    yield "\nTools: calculator"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the embedded policy.

    Returns
    -------
    PreTrainedTokenizerFast
        About 480 tokens; ``decode(encode(text)) == text`` for every text.

    Examples
    --------
    >>> tokenizer = make_tokenizer()
    >>> tokenizer.tokenize("Day 1: She buys 15 apples.")
    ['Day 1:', ' She', ' buys ', '1', '5', ' apples', '.']
    """
    splitter = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    words = {piece for text in _texts() for piece, _ in splitter.pre_tokenize_str(text)}
    characters = {chr(code) for code in range(32, 127)} | {"\n"}
    pieces = [*sorted(characters), *sorted(words - characters)]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    raw = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            ignore_merges=True,
        )
    )
    raw.pre_tokenizer = splitter
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
    plain = (*_call_tokens(), SYSTEM_PROMPT, *RENDERING_TOKENS)
    raw.add_tokens([AddedToken(token, normalized=False) for token in plain])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerBase, *, seed: int) -> LlamaForCausalLM:
    """Build the embedded policy with random weights.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Fixes the vocabulary and the special ids.
    seed : int
        Fixes the initial weights.

    Returns
    -------
    LlamaForCausalLM
        4 layers, width 128, 8 heads that share 2 key-value heads, float32.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        # Decoding on a CPU is bound by reading the key-value cache; shared heads quarter it.
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # Episodes are short: with the usual base of 10,000 most rotary dimensions would not turn,
        # and finding the next sentence takes several times as long to learn.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
