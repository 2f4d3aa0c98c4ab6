"""One turn in the words of vLLM's ``/v1/completions``: what is asked, and what may be believed.

Ids go in and come out, so no tokenizer of the server decides anything. Everything a server says
is checked before it becomes part of a trajectory: an answer that breaks a rule is the server's
fault, whatever of it looked right.
"""

from __future__ import annotations

import hashlib
import json
import math
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.engines.base import GenerateRequest, Generation

_LONGEST_ID = 160
"""Characters of a request id that go into a header as they are."""
_ROUNDING = 1e-4
"""A log-probability above 0 by no more than this is 0 computed in floating point."""


class ServerFault(Exception):
    """A server did not answer, or not in a way that can be used; another one may.

    Parameters
    ----------
    reason : str
        What it did, as the rest of a sentence about it.
    busy : bool
        Whether it only has too much to do.
    retry_after_s : float, optional
        When it asked to be tried again, seconds from now.
    misfit : bool
        Whether it works but is not what this run needs.
    """

    def __init__(
        self,
        reason: str,
        *,
        busy: bool = False,
        retry_after_s: float | None = None,
        misfit: bool = False,
    ) -> None:
        super().__init__(reason)
        self.busy = busy
        self.retry_after_s = retry_after_s
        self.misfit = misfit


class RequestRefused(Exception):
    """A server says that the request itself is impossible; no other one will think otherwise."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


class _Logprobs(_Strict):
    token_logprobs: list[float]
    tokens: list[str]


class _Choice(_Strict):
    index: int
    token_ids: list[int]
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None


class _PromptDetails(_Strict):
    cached_tokens: int | None = None


class _Usage(_Strict):
    prompt_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Part(_Strict):
    """A whole answer, or one event of a stream."""

    id: str
    model: str
    choices: list[_Choice]
    usage: _Usage | None = None


def header_id(request_id: str) -> str:
    """Write a request id so that a header can carry it; different ids stay different.

    Examples
    --------
    >>> header_id("t7/0@2/1.0#3"), header_id("Maße")
    ('t7/0@2/1.0#3', 'Ma%C3%9Fe')
    """
    quoted = quote(request_id, safe="/@#:.,;=+")
    if len(quoted) <= _LONGEST_ID:
        return quoted
    return f"{quoted[:_LONGEST_ID]}~{hashlib.sha256(request_id.encode()).hexdigest()[:32]}"


class Draft:
    """A turn that one server is writing; made anew for every attempt.

    Parameters
    ----------
    request : GenerateRequest
        What to sample.
    model : str
        Name under which the servers serve the policy.
    vocabulary : int
        Number of ids the policy knows.
    max_context : int
        Longest prompt plus turn, tokens.
    """

    def __init__(
        self, request: GenerateRequest, *, model: str, vocabulary: int, max_context: int
    ) -> None:
        self.request_id = header_id(request.request_id)
        self.streamed = request.stop_when is not None
        """Only a stream can be left in the middle, and it costs an event per token."""
        self.limit = min(request.sampling.max_tokens, max_context - len(request.prompt_ids))
        self.prompt_tokens = len(request.prompt_ids)
        self.cached_tokens = 0
        self._request = request
        self._model = model
        self._vocabulary = vocabulary
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._finish: str | None = None
        self._stop_reason: int | str | None = None
        self._prompt_seen = False
        self._cut = False

    @property
    def body(self) -> bytes:
        """The request as JSON.

        Whatever a model's ``generation_config.json`` could change on the server is said outright.
        """
        request, sampling = self._request, self._request.sampling
        fields = {
            "model": self._model,
            "prompt": request.prompt_ids,
            "max_tokens": self.limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": request.seed,
            "stop_token_ids": request.stop_ids,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": self.streamed,
        }
        if self.streamed:
            fields["stream_options"] = {"include_usage": True}
        return json.dumps(fields, separators=(",", ":")).encode()

    @property
    def begun(self) -> bool:
        """Whether a server has answered anything yet."""
        return self._prompt_seen or bool(self._ids)

    def add(self, raw: bytes) -> bool:
        """Take an answer, or the next event of a stream.

        Parameters
        ----------
        raw : bytes
            JSON.

        Returns
        -------
        bool
            Whether ``stop_when`` has ended the turn, so that the rest need not be read.

        Raises
        ------
        ServerFault
            If it is not what was asked for.
        """
        part = _parsed(raw)
        if part.model != self._model:
            raise ServerFault(f"answered as model {part.model!r}, not {self._model!r}")
        if not part.id.endswith(self.request_id):
            raise ServerFault(f"answered {self.request_id!r} with the answer to {part.id!r}")
        if part.usage is not None:
            details = part.usage.prompt_tokens_details
            self.prompt_tokens = part.usage.prompt_tokens or self.prompt_tokens
            self.cached_tokens = (details.cached_tokens or 0) if details else 0
        if len(part.choices) > 1 or any(choice.index for choice in part.choices):
            raise ServerFault("gave several answers to one request")
        return bool(part.choices) and self._extend(part.choices[0])

    def generation(self) -> Generation:
        """Return the turn.

        Raises
        ------
        ServerFault
            If it is not finished, or did not end as it was asked to.
        """
        finish = "stop" if self._cut else self._finish
        if finish not in ("stop", "length"):
            raise ServerFault(f"ended the answer with finish reason {finish!r}")
        if not self._ids:
            raise ServerFault("ended the answer without a token")
        if not self._prompt_seen:
            raise ServerFault("did not say which prompt ids it used: is it vLLM 0.32 or newer?")
        stops = [n for n, i in enumerate(self._ids, 1) if i in self._request.stop_ids]
        if finish == "length" and (stops or len(self._ids) != self.limit):
            raise ServerFault(
                f"ended the answer for its length after {len(self._ids)} of {self.limit} tokens"
            )
        if finish == "stop" and not self._cut and stops != [len(self._ids)]:
            raise ServerFault(
                f"stopped at {self._stop_reason or self._ids[-1]!r}, which is no stop id of the "
                "request: start it with --generation-config vllm"
            )
        return Generation(
            token_ids=tuple(self._ids),
            logprobs=tuple(self._logprobs),
            finish="stop" if finish == "stop" else "length",
        )

    def _extend(self, choice: _Choice) -> bool:
        """Append new tokens; return whether ``stop_when`` says that one of them ends the turn."""
        if choice.prompt_token_ids is not None:
            if tuple(choice.prompt_token_ids) != self._request.prompt_ids:
                raise ServerFault("continued another prompt than it was given")
            self._prompt_seen = True
        if self._finish is not None and choice.token_ids:
            raise ServerFault("went on after the end of the answer")
        self._finish = choice.finish_reason or self._finish
        self._stop_reason = choice.stop_reason
        for token, logprob in zip(choice.token_ids, self._checked_logprobs(choice), strict=True):
            self._ids.append(token)
            self._logprobs.append(logprob)
            if self._request.stop_when is not None and self._request.stop_when(self._ids):
                self._cut = True
                return True
        return False

    def _checked_logprobs(self, choice: _Choice) -> list[float]:
        """Return one log-probability per new token."""
        ids = choice.token_ids
        wrong = next((i for i in ids if not 0 <= i < self._vocabulary), None)
        if wrong is not None:
            raise ServerFault(f"gave id {wrong}, outside the vocabulary of {self._vocabulary}")
        if len(self._ids) + len(ids) > self.limit:
            raise ServerFault(f"gave more than the {self.limit} tokens asked for")
        if not ids:
            return []
        given = choice.logprobs or _Logprobs(token_logprobs=[], tokens=[])
        names = [f"token_id:{i}" for i in ids]
        if len(given.token_logprobs) != len(ids) or given.tokens != names:
            raise ServerFault("gave log-probabilities that do not belong to its tokens")
        if any(not math.isfinite(lp) or lp > _ROUNDING for lp in given.token_logprobs):
            raise ServerFault("gave a log-probability that is none")
        return [min(0.0, lp) for lp in given.token_logprobs]


def _parsed(raw: bytes) -> _Part:
    """Read one JSON object, or say what is wrong with it."""
    try:
        return _Part.model_validate_json(raw)
    except ValidationError as error:
        said = error_sentence(raw)
        if said is not None:
            raise ServerFault(f"broke off with: {said}") from error
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "json_invalid":
            raise ServerFault(f"sent JSON that is not complete ({len(raw)} bytes)") from error
        raise ServerFault(f"sent an answer with a wrong {where}: {first['msg']}") from error


def error_sentence(raw: bytes) -> str | None:
    """Find the sentence in a server's error body; None if it is no such body.

    Examples
    --------
    >>> error_sentence(b'{"error": {"message": "too long", "code": 400}}')
    'too long'
    """
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    if not isinstance(body, dict):
        return None
    error = body.get("error", body)
    if isinstance(error, str):
        return error
    if isinstance(error, dict):
        said = error.get("message", error.get("detail"))
        return None if said is None else " ".join(str(said).split())[:500]
    return None
