"""The chat format: prompt ids, observation ids and tool-call parsing for one tokenizer.

Ids flow one way. What the model samples is never decoded and encoded again; a tool's result is
appended as the ids that the model's own template would put after the turn, found by rendering a
conversation with placeholders and taking the text behind them (*template difference*). Text from
outside (problems, observations) is encoded with special tokens split, so that no tool output can
forge the end of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from agent.tools.base import Tool, schema
from trajectory.errors import InputError
from trajectory.records import JsonValue, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatKind = Literal["auto", "template", "chatml"]

CHATML_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{%- if system or tools %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
{{- '\\n\\n' if system else '' }}
{{- 'You may call one of these tools, one JSON object per line:\\n' }}
{%- for tool in tools %}{{- tool.function | tojson + '\\n' }}{%- endfor %}
{{- 'To call a tool, write\\n<tool_call>\\n' }}
{{- '{"name": <name>, "arguments": <object>}\\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Built-in replacement for models whose own template knows no tools or rewrites history."""

_USER, _TURN = "PLACEHOLDERuser", "PLACEHOLDERturn"
_TOOL = "PLACEHOLDERtool{}end"
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FENCED = re.compile(r"```(\w*)[ \t]*\n(.*?)```", re.DOTALL)
_CLOSED_FENCE = re.compile(r"```\w*[ \t]*\n.*?```\s*\Z", re.DOTALL)
_CODE_LANGUAGES = ("python", "py", "tool_code")
_KNOWN_TEXTS = 1024
"""Texts whose ids are kept."""
_OFFER = "use --chat-format chatml for the built-in format"


@dataclass(frozen=True, kw_only=True, slots=True)
class BadCall:
    """A tool call that could not be read; the model gets the reason as an observation."""

    text: str
    """What stood where the call should be."""
    reason: str
    """Why it is no call, in words for the model."""


def parse_calls(text: str, tool_names: Sequence[str]) -> list[ToolCall | BadCall]:
    r"""Find the tool calls of one assistant turn.

    Three spellings are read, the first that occurs wins: ``<tool_call>{json}</tool_call>`` blocks;
    fenced blocks (```` ```python ```` runs the ``python`` tool if there is one, ```` ```json ````
    holding a call); a turn that is nothing but the JSON object of a call.

    Parameters
    ----------
    text : str
        The turn, without its end-of-turn token.
    tool_names : sequence of str
        Tools on offer. A tagged call to another name is returned as written (the episode answers
        that there is no such tool); fenced and bare JSON count only if they name one of these.

    Returns
    -------
    list of ToolCall or BadCall
        In order of appearance; empty when the turn calls nothing.

    Examples
    --------
    >>> parse_calls("```python\nprint(1)\n```", ["python"])
    [ToolCall(name='python', arguments='{"code": "print(1)\\n"}')]
    """
    tagged = [_read_call(body) for body in _TAGGED.findall(text)]
    if tagged:
        return tagged
    fenced = [
        call
        for language, body in _FENCED.findall(text)
        if (call := _read_fence(language.lower(), body, tool_names)) is not None
    ]
    if fenced:
        return fenced
    bare = text.strip()
    if bare.startswith("{") and bare.endswith("}"):
        call = _read_call(bare)
        if isinstance(call, ToolCall) and call.name in tool_names:
            return [call]
    return []


def _read_fence(language: str, body: str, tool_names: Sequence[str]) -> ToolCall | BadCall | None:
    """Read one fenced block, or None if it is not a call."""
    if language in _CODE_LANGUAGES and "python" in tool_names:
        return ToolCall(name="python", arguments=json.dumps({"code": body}))
    if language in ("json", "tool_call", ""):
        call = _read_call(body)
        if isinstance(call, ToolCall) and call.name in tool_names:
            return call
    return None


def _read_call(body: str) -> ToolCall | BadCall:
    """Read the JSON object of one call."""
    text = body.strip()
    try:
        value: JsonValue = json.loads(text, strict=False)
    except (json.JSONDecodeError, RecursionError) as error:
        return BadCall(text=text, reason=f"the call is not valid JSON ({error})")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return BadCall(text=text, reason='the call must be {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            return BadCall(text=text, reason="arguments is a string that is not JSON")
    if not isinstance(arguments, dict):
        return BadCall(text=text, reason="arguments must be a JSON object")
    return ToolCall(name=str(value["name"]), arguments=json.dumps(arguments))


class ChatFormat:
    """Turns conversations into token ids for one tokenizer, template and set of tools.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        With a chat template.
    tools : sequence of Tool
        Offered to the model in every prompt.

    Raises
    ------
    InputError
        If there is no template, it ignores the tools, does not end an assistant turn with a
        single token, or is not prefix-preserving (later messages change how earlier ones render).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool]) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: {_OFFER}"
            )
        self.tokenizer = tokenizer
        self.tool_names = tuple(tool.name for tool in tools)
        self._schemas: list[Any] = [schema(tool) for tool in tools]
        self._observation_parts: dict[int, list[str]] = {}
        self._prompt_frames: dict[str, tuple[str, str]] = {}
        self._known: dict[tuple[str, bool], tuple[int, ...]] = {}
        self._check_template()

    @classmethod
    def load(cls, policy: str, *, tools: Sequence[Tool], kind: ChatKind = "auto") -> ChatFormat:
        """Load the tokenizer of ``policy`` and its template, or the built-in ChatML one.

        Parameters
        ----------
        policy : str
            Hub id or folder.
        tools : sequence of Tool
            Tools on offer.
        kind : {"auto", "template", "chatml"}
            ``auto`` and ``template`` use the tokenizer's own template and refuse an unfit one;
            ``chatml`` replaces it (the tokenizer must know ``<|im_start|>`` and ``<|im_end|>``).
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(policy)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"no tokenizer could be loaded from {policy!r}: {reason}") from error
        if kind == "chatml":
            vocabulary = tokenizer.get_vocab()
            missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in vocabulary]
            if missing:
                raise InputError(
                    f"--chat-format chatml needs the tokens {missing} in the vocabulary of "
                    f"{policy!r}: choose a model that has them"
                )
            tokenizer.chat_template = CHATML_TEMPLATE
        return cls(tokenizer, tools)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the template's end-of-turn token and the end-of-text token."""
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys(i for i in (self._end_of_turn, eos) if i is not None))

    def prompt_ids(self, system: str, prompt: str) -> tuple[int, ...]:
        """Return the ids up to and including the header of the first assistant turn."""
        frame = self._prompt_frames.get(system)
        if frame is None:
            before, after = self._render(system, [], generation=True).split(_USER)
            frame = self._prompt_frames[system] = (before, after)
        before, after = frame
        return (*self._encode(before), *self._encode_foreign(prompt), *self._encode(after))

    def observation_ids(
        self, results: Sequence[tuple[str, str]], *, turn_ended: bool = True
    ) -> tuple[int, ...]:
        """Return the ids that follow a turn when tools answered.

        Parameters
        ----------
        results : sequence of (str, str)
            Tool name and content, in call order; at least one.
        turn_ended : bool
            Whether the turn's own ids hold its end-of-turn token; if not, it is put first here.

        Returns
        -------
        tuple of int
            Ends with the header of the next assistant turn.
        """
        parts = self._observation_parts.get(len(results))
        if parts is None:
            parts = self._observation_parts[len(results)] = self._observation_frame(len(results))
        ids = [] if turn_ended else [self._end_of_turn]
        ids += self._encode(parts[0])
        for (_, content), part in zip(results, parts[1:], strict=True):
            ids += self._encode_foreign(content)
            ids += self._encode(part)
        return tuple(ids)

    def turn_ids(self, text: str) -> tuple[int, ...]:
        """Encode a written (not sampled) turn and end it."""
        return (*self._encode(text), self._end_of_turn)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a turn without its end-of-turn token."""
        body = token_ids[:-1] if token_ids and token_ids[-1] in self.stop_ids else token_ids
        text = self.tokenizer.decode(
            list(body), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def call_complete(self, token_ids: Sequence[int]) -> bool:
        """Tell whether the turn so far ends with the fence that closes a code call.

        A model that writes calls as fenced code goes on to invent the result; its turn ends at
        the closing fence, so that the result it sees is real.
        """
        if "python" not in self.tool_names:
            return False
        if "`" not in self.tokenizer.decode(list(token_ids[-1:])):
            return False
        text = self.decode(token_ids)
        return bool(_CLOSED_FENCE.search(text)) and bool(self.parse(text))

    def parse(self, text: str) -> list[ToolCall | BadCall]:
        """Find the tool calls of a turn; see `parse_calls`."""
        return parse_calls(text, self.tool_names)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Encode text of our own making, special tokens recognised."""
        return self._ids_of(text, foreign=False)

    def _encode_foreign(self, text: str) -> tuple[int, ...]:
        """Encode text from outside: special tokens in it are ordinary characters."""
        return self._ids_of(text, foreign=True)

    def _ids_of(self, text: str, *, foreign: bool) -> tuple[int, ...]:
        """Encode text; rollouts of one state begin alike, and frames come back in every turn."""
        ids = self._known.get((text, foreign))
        if ids is None:
            encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=foreign)
            ids = tuple(encoded["input_ids"])
            if len(self._known) >= _KNOWN_TEXTS:
                self._known.clear()
            self._known[text, foreign] = ids
        return ids

    def _render(
        self, system: str, later: Sequence[dict[str, str]], *, generation: bool = False
    ) -> str:
        """Render system + placeholder user message + ``later`` to text."""
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "user", "content": _USER}, *later]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=self._schemas or None,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except TemplateError as error:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path!r} cannot render a "
                f"conversation with tools ({error}): {_OFFER}"
            ) from error
        return str(text)

    @cached_property
    def _end_of_turn(self) -> int:
        """Id of the single token that ends an assistant turn."""
        rendered = self._render("", [{"role": "assistant", "content": _TURN}])
        ids = self._encode(rendered.partition(_TURN)[2])
        if not ids or ids[0] not in self.tokenizer.all_special_ids:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not end an assistant "
                f"turn with a special token: {_OFFER}"
            )
        return ids[0]

    def _observation_frame(self, count: int) -> list[str]:
        """Return the count + 1 texts around the tool results that follow an end of turn."""
        tools = [{"role": "tool", "content": _TOOL.format(i)} for i in range(count)]
        turn = {"role": "assistant", "content": _TURN}
        rendered = self._render("", [turn, *tools], generation=True)
        text = rendered.partition(_TURN)[2]
        end = str(self.tokenizer.convert_ids_to_tokens(self._end_of_turn))
        parts = re.split("|".join(re.escape(_TOOL.format(i)) for i in range(count)), text)
        if not text.startswith(end) or len(parts) != count + 1:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not put tool results "
                f"after the assistant turn: {_OFFER}"
            )
        parts[0] = parts[0].removeprefix(end)
        return parts

    def _check_template(self) -> None:
        """Refuse a template that this format cannot be built from."""
        name = self.tokenizer.name_or_path
        prompt = self._render("", [], generation=True)
        if prompt.count(_USER) != 1:
            raise InputError(f"the chat template of {name!r} drops the user's message: {_OFFER}")
        hidden = [tool for tool in self.tool_names if tool not in prompt]
        if hidden:
            raise InputError(
                f"the chat template of {name!r} does not show tools {hidden}: {_OFFER}"
            )
        turn = {"role": "assistant", "content": _TURN}
        stages = [prompt, self._render("", [turn]).partition(_TURN)[0]]
        if self.tool_names:
            tool = {"role": "tool", "content": _TOOL.format(0)}
            full = self._render("", [turn, tool, turn], generation=False)
            stages += [full.partition(_TURN)[0]]
            self._observation_frame(1)
        if any(not stage.startswith(prompt) for stage in stages[1:]):
            raise InputError(
                f"the chat template of {name!r} is not prefix-preserving (later messages change "
                f"how earlier ones are written): {_OFFER}"
            )
