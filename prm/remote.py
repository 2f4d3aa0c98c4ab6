"""Scores from a server: the interface of `Scorer` for ``prm serve`` and for vLLM.

A ``prm serve`` server does everything and is sent trajectories. A vLLM server
(``vllm serve CKPT --runner pooling``) only runs the network: trajectories are rendered here, the
server is sent token ids, and its logits are turned into scores here, so this side needs the
checkpoint's folder too, for the tokenizer and ``prm.json`` (the weights are not loaded). A model of
the implicit head is no single network, so only ``prm serve`` serves it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import urllib3

from prm.checkpoint import METADATA, load_metadata, vocabulary_of
from prm.heads import get_head
from prm.metrics import Array
from prm.model import open_tokenizer
from prm.rendering import render
from prm.score import make_scores
from trajectory.codec import from_json, to_json
from trajectory.errors import InputError
from trajectory.records import JsonValue, StepScores, Trajectory
from trajectory.run import sha256_of

TOKEN_VARIABLE = "TOOLPRM_SERVER_TOKEN"  # noqa: S105 - the name of a variable, no token
"""Environment variable of the bearer token, for servers and their clients."""
_RETRIED = (429, 502, 503, 504)
_LONGEST_PAUSE_S = 60


class _Backend(Protocol):
    """One kind of server."""

    def score(self, chunk: Sequence[Trajectory], *, calibrated: bool) -> list[StepScores]:
        """Score a few trajectories with one request."""


class RemoteScorer:
    """Scores trajectories with a reward model that a server runs.

    Parameters
    ----------
    url : str
        Of a ``prm serve`` server, or of a vLLM server if ``prm`` is given.
    prm : str or Path, optional
        The checkpoint's folder, for a vLLM server that serves it; not for the implicit head.
    per_request : int, default=8
        Trajectories of one request.
    concurrency : int, default=8
        Requests in flight.
    retries : int, default=6
        How often a request is tried again when the server is busy or cannot be reached, with
        pauses that double from 0.5 s or are what ``Retry-After`` says.
    timeout_s : float, default=300
        For one answer.
    token : str, optional
        Bearer token; by default that of the environment variable ``TOOLPRM_SERVER_TOKEN``, if set.

    Raises
    ------
    InputError
        If no such server answers, or it serves another model.

    Notes
    -----
    Safe to use from several threads. Scoring has no side effects, so trying again is safe.
    """

    def __init__(
        self,
        url: str,
        *,
        prm: str | Path | None = None,
        per_request: int = 8,
        concurrency: int = 8,
        retries: int = 6,
        timeout_s: float = 300.0,
        token: str | None = None,
    ) -> None:
        if per_request < 1 or concurrency < 1 or retries < 0:
            raise InputError("per_request and concurrency must be at least 1, retries at least 0")
        self._per_request, self._concurrency = per_request, concurrency
        if not url.startswith(("http://", "https://")):
            raise InputError(
                f"{url!r} is no address of a server: begin it with http:// or https://"
            )
        token = token or os.environ.get(TOKEN_VARIABLE)
        wire = _Wire(
            url, retries=retries, timeout_s=timeout_s, token=token, connections=concurrency
        )
        self._backend: _Backend = _PrmServe(wire) if prm is None else _Vllm(wire, Path(prm))

    def score(
        self, trajectories: Sequence[Trajectory], *, calibrated: bool = True
    ) -> list[StepScores]:
        """Score every prefix of every trajectory; see `Scorer.score`.

        Raises
        ------
        InputError
            If the server refuses a trajectory, or stays busy or dead through all retries.
        """
        chunks = list(_chunks(trajectories, self._per_request))

        def score_chunk(chunk: Sequence[Trajectory]) -> list[StepScores]:
            return self._backend.score(chunk, calibrated=calibrated)

        with ThreadPoolExecutor(max_workers=self._concurrency) as pool:
            answers = list(pool.map(score_chunk, chunks))
        scores = [s for answer in answers for s in answer]
        for trajectory, found in zip(trajectories, scores, strict=True):
            asked = [len(step.calls) for step in trajectory.steps]
            if (found.trajectory_id, len(found.values), [len(c) for c in found.calls]) != (
                trajectory.trajectory_id,
                trajectory.num_steps + 1,
                asked,
            ):
                raise InputError(
                    f"the server answered for {found.trajectory_id!r} where "
                    f"{trajectory.trajectory_id!r} was asked: it is no server of this version"
                )
        return scores


def _chunks(rows: Sequence[Trajectory], size: int) -> Iterator[Sequence[Trajectory]]:
    """Cut a list."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class _Wire:
    """HTTP with retries, from any number of threads."""

    def __init__(
        self, url: str, *, retries: int, timeout_s: float, token: str | None, connections: int
    ) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._pool = urllib3.PoolManager(
            maxsize=connections,
            timeout=urllib3.Timeout(timeout_s),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            retries=urllib3.Retry(
                total=retries,
                read=0,  # a server that takes too long is not asked to do it once more
                backoff_factor=0.5,
                backoff_jitter=0.2,
                backoff_max=_LONGEST_PAUSE_S,
                retry_after_max=_LONGEST_PAUSE_S,
                status_forcelist=_RETRIED,
                allowed_methods=None,
                raise_on_status=False,
            ),
        )

    def get(self, path: str) -> Any:  # noqa: ANN401 - whatever JSON comes
        """Ask for a page; None if it is no JSON."""
        return _json(self._send("GET", path, {}))

    def post(self, path: str, body: JsonValue) -> Any:  # noqa: ANN401 - whatever JSON comes
        """Send a request and return the JSON of the answer."""
        return _json(self._send("POST", path, {"json": body}))

    def _send(self, method: str, path: str, rest: dict[str, Any]) -> urllib3.BaseHTTPResponse:
        """Send a request, with retries; refusals and dead servers end in one sentence."""
        try:
            response = self._pool.request(method, f"{self.url}{path}", **rest)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, urllib3.exceptions.ReadTimeoutError):
                raise InputError(
                    f"{self.url} gave no answer in {self._timeout_s:g} s: is it overloaded?"
                ) from error
            raise InputError(
                f"no server answers at {self.url}: start `prm serve` or vLLM there, or correct "
                "the address"
            ) from error
        if response.status != 200:
            raise InputError(f"{self.url} answered {response.status}: {_detail(response)}")
        return response


def _json(response: urllib3.BaseHTTPResponse) -> Any:  # noqa: ANN401 - whatever JSON comes
    """Read an answer's JSON; None if it is none."""
    try:
        return response.json()
    except ValueError:
        return None


def _detail(response: urllib3.BaseHTTPResponse) -> str:
    """Find the sentence in an answer that refuses."""
    body = _json(response)
    if body is None:
        return response.data.decode(errors="replace").strip()[:300] or str(response.reason)
    detail = body.get("detail", body.get("error", body)) if isinstance(body, dict) else body
    if isinstance(detail, dict):
        return str(detail.get("message", detail))
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        places = [".".join(str(p) for p in d.get("loc", [])) for d in detail]
        return "; ".join(f"{p}: {d.get('msg')}" for p, d in zip(places, detail, strict=True))
    return str(detail)


class _PrmServe:
    """A ``prm serve`` server."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        health = wire.get("/health")
        if not isinstance(health, dict) or health.get("server") != "prm serve":
            raise InputError(
                f"{wire.url} is no `prm serve` server: for a vLLM server, give the checkpoint's "
                "folder as well (prm=...)"
            )

    def score(self, chunk: Sequence[Trajectory], *, calibrated: bool) -> list[StepScores]:
        """Send trajectories, get scores."""
        body: JsonValue = {"trajectories": [to_json(t) for t in chunk], "calibrated": calibrated}
        answer = self._wire.post("/score", body)
        return [from_json(StepScores, s) for s in answer["scores"]]


class _Vllm:
    """A vLLM server with the pooling runner."""

    def __init__(self, wire: _Wire, folder: Path) -> None:
        self._wire = wire
        self._metadata = load_metadata(folder)
        if get_head(self._metadata.head).is_log_ratio:
            raise InputError(
                f"{folder} has head {self._metadata.head!r}, two language models that vLLM does "
                f"not compare: serve it with `prm serve --prm {folder}` and give that address alone"
            )
        self._tokenizer = open_tokenizer(folder)
        if vocabulary_of(self._tokenizer) != self._metadata.vocabulary:
            raise InputError(f"the tokenizer in {folder} is not the one this PRM was trained with")
        self._tokenising = threading.Lock()  # a fast tokenizer is not safe to use from several
        self._hash = sha256_of(folder / METADATA)
        models = wire.get("/v1/models")["data"]
        self._model, self._longest = models[0]["id"], models[0].get("max_model_len")

    def score(self, chunk: Sequence[Trajectory], *, calibrated: bool) -> list[StepScores]:
        """Send token ids, get the logits of every token."""
        with self._tokenising:
            rendered = render(chunk, self._tokenizer, position=self._metadata.position)
        for trajectory, row in zip(chunk, rendered, strict=True):
            if self._longest is not None and len(row.input_ids) > self._longest:
                raise InputError(
                    f"trajectory {trajectory.trajectory_id} has {len(row.input_ids)} tokens, the "
                    f"server takes {self._longest}: leave it out or serve with a larger "
                    "--max-model-len"
                )
        body: JsonValue = {
            "model": self._model,
            "task": "token_classify",
            "input": [list(row.input_ids) for row in rendered],
            "add_special_tokens": False,
            "use_activation": False,
        }
        answer = self._wire.post("/pooling", body)
        by_index = {item["index"]: item["data"] for item in answer["data"]}
        return [
            make_scores(
                self._metadata,
                self._hash if calibrated else f"{self._hash}+raw",
                trajectory,
                rendered[i],
                self._margins(by_index[i], rendered[i].scored),
                calibrated=calibrated,
            )
            for i, trajectory in enumerate(chunk)
        ]

    def _margins(self, logits: Sequence[Sequence[float]], positions: Sequence[int]) -> Array:
        """Pick the log-odds of the scored positions out of the logits of all tokens."""
        logits_PC = torch.tensor([logits[p] for p in positions])
        margins_P: Array = np.asarray(get_head(self._metadata.head).margin(logits_PC).double())
        return margins_P
