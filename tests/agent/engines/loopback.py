"""A real HTTP server on loopback that speaks vLLM's protocol, and misbehaves where it is told to.

It runs in a thread of its own, so that it also answers while the test's event loop is blocked.
"""

import asyncio
import json
import random
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

from aiohttp import web

from agent.engines.base import EngineOptions, GenerateRequest
from agent.engines.transformers import TransformersEngine
from tests.agent.engines.tiny import VOCABULARY, request
from trajectory.records import Sampling
from trajectory.seeds import derive_seed

MODEL = "tiny"

Turn = tuple[list[int], list[float], str]
Behaviour = Callable[["Loopback", web.Request, dict], Awaitable[web.StreamResponse]]


def dice(body: dict) -> Turn:
    """A turn that depends on prompt and seed alone, like a seeded sample."""
    rng = random.Random(derive_seed(*body["prompt"], body["seed"]))
    ids = [rng.randrange(1, VOCABULARY) for _ in range(body["max_tokens"])]
    ends = [n for n, i in enumerate(ids, 1) if i in body["stop_token_ids"]]
    ids = ids[: ends[0]] if ends else ids
    only = body["top_k"] == 1
    logprobs = [0.0 if only else -rng.random() for _ in ids]
    return ids, logprobs, "stop" if ends else "length"


def policy_behind(options: EngineOptions) -> Callable[[dict], Awaitable[Turn]]:
    """Turns that a real policy writes, for `Loopback`."""
    engine = TransformersEngine(options)

    async def write(body: dict) -> Turn:
        turn = await engine.generate(
            GenerateRequest(
                request_id="behind",
                prompt_ids=tuple(body["prompt"]),
                sampling=Sampling(
                    **{n: body[n] for n in ("temperature", "top_p", "top_k", "max_tokens")}
                ),
                seed=body["seed"],
                stop_ids=tuple(body["stop_token_ids"]),
            )
        )
        return list(turn.token_ids), list(turn.logprobs), turn.finish

    return write


class Loopback:
    """One server.

    ``misbehave`` holds what happens to the next requests, one each; when it is empty, ``always``
    happens, and without it a good answer is given. The trials of the engine get good answers.
    """

    def __init__(self, *, model=MODEL, max_model_len=512, write=None, token=None):
        self.model, self.max_model_len, self.token = model, max_model_len, token
        self.write = write
        self.misbehave: deque[Behaviour] = deque()
        self.always: Behaviour | None = None
        self.healthy = True
        self.delay_s = 0.0
        self.raw_logprobs = False
        self.asked: list[str] = []
        """Ids of the requests that came, trials aside, in order."""
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.answered: Counter[str] = Counter()
        self.aborted: list[str] = []
        self.trials = 0
        self.alive = self.most_alive = 0
        self._port = 0
        self._runner: web.AppRunner | None = None
        self._accepting: list[web.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> "Loopback":
        """Listen; on the port it had before, if it had one."""
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def stop(self) -> None:
        """Break every connection and refuse new ones."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()

    def close(self) -> None:
        """Stop, and end the thread."""
        self.stop()
        asyncio.run_coroutine_threadsafe(self._abort_late(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self):
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01
        )
        await self._runner.setup()
        self._accepting.append(self._runner.server)
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def _stop(self):
        runner, self._runner = self._runner, None
        if runner is not None:
            self._abort()
            await runner.cleanup()

    async def _abort_late(self):
        """End connections that were being accepted while the server was stopped."""
        await asyncio.sleep(0.01)
        self._abort()
        await asyncio.sleep(0.01)

    def _abort(self):
        for server in self._accepting:
            for connection in server.connections:
                if connection.transport is not None:
                    connection.transport.abort()

    async def _health(self, request):
        while not self.healthy:
            await asyncio.sleep(0.01)
        return web.Response()

    async def _models(self, request):
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        card = {"id": self.model, "max_model_len": self.max_model_len, "object": "model"}
        return web.json_response({"object": "list", "data": [card]})

    async def _completions(self, request):
        body = await request.json()
        request_id = request.headers["X-Request-Id"]
        if request_id.startswith("trial/"):
            self.trials += 1
            return await answer(self, request, body)
        self.asked.append(request_id)
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        try:
            behaviour = self.misbehave.popleft() if self.misbehave else self.always or answer
            response = await behaviour(self, request, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.aborted.append(request_id)
            raise
        finally:
            self.alive -= 1
        if behaviour is answer:
            self.answered[request_id] += 1
        return response

    async def turn(self, body: dict) -> Turn:
        await asyncio.sleep(self.delay_s)
        ids, logprobs, finish = dice(body) if self.write is None else await self.write(body)
        if self.raw_logprobs:
            logprobs = [-0.7 for _ in ids]
        return ids, logprobs, finish


def choice(ids, logprobs, finish, prompt=None) -> dict:
    names = [f"token_id:{i}" for i in ids]
    return {
        "index": 0,
        "text": "",
        "token_ids": ids,
        "logprobs": {"token_logprobs": logprobs, "tokens": names, "top_logprobs": []},
        "finish_reason": finish,
        "stop_reason": ids[-1] if finish == "stop" and ids else None,
        "prompt_token_ids": prompt,
    }


def envelope(server: Loopback, request: web.Request, choices: list, usage=None) -> dict:
    return {
        "id": f"cmpl-{request.headers['X-Request-Id']}",
        "object": "text_completion",
        "model": server.model,
        "choices": choices,
        "usage": usage,
    }


async def good(server: Loopback, request: web.Request, body: dict) -> dict:
    """The whole answer, as JSON."""
    ids, logprobs, finish = await server.turn(body)
    usage = {
        "prompt_tokens": len(body["prompt"]),
        "completion_tokens": len(ids),
        "prompt_tokens_details": {"cached_tokens": len(body["prompt"]) // 2},
    }
    return envelope(server, request, [choice(ids, logprobs, finish, body["prompt"])], usage)


async def answer(server: Loopback, request: web.Request, body: dict) -> web.StreamResponse:
    """Answer well."""
    whole = await good(server, request, body)
    if not body["stream"]:
        return web.json_response(whole)
    return await stream(server, request, whole)


async def stream(server, request, whole, *, upto=None, pause_s=0.0) -> web.StreamResponse:
    """Send an answer token by token; break off after some, if told to."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    (full,) = whole["choices"]
    lps = full["logprobs"]["token_logprobs"]
    events = []
    for n, (i, lp) in enumerate(zip(full["token_ids"], lps, strict=True)):
        last = n == len(lps) - 1
        prompt = None if n else full["prompt_token_ids"]
        part = choice([i], [lp], full["finish_reason"] if last else None, prompt)
        events.append(json.dumps(envelope(server, request, [part])))
    events += [json.dumps(envelope(server, request, [], whole["usage"])), "[DONE]"]
    for event in events[:upto]:
        await response.write(f"data: {event}\n\n".encode())
        await asyncio.sleep(pause_s)
    if upto is not None:
        request.transport.abort()
    return response


# -- ways to misbehave -------------------------------------------------------------------------


def status(code: int, message: str = "no", **headers: str) -> Behaviour:
    async def behave(server, request, body):
        error = {"error": {"message": message, "type": "x", "code": code}}
        return web.json_response(error, status=code, headers=headers)

    return behave


def altered(change: Callable[[dict], None]) -> Behaviour:
    """Change a good answer."""

    async def behave(server, request, body):
        whole = await good(server, request, body)
        change(whole)
        return web.Response(text=json.dumps(whole), content_type="application/json")

    return behave


async def half_json(server, request, body):
    text = json.dumps(await good(server, request, body))
    return web.Response(text=text[: len(text) // 2], content_type="application/json")


async def broken_body(server, request, body):
    """Announce more than is sent, and close."""
    response = web.StreamResponse(headers={"Content-Length": "5000"})
    await response.prepare(request)
    await response.write(b'{"id": "')
    request.transport.abort()
    return response


async def closed(server, request, body):
    request.transport.abort()
    return web.Response()


async def broken_stream(server, request, body):
    return await stream(server, request, await good(server, request, body), upto=3)


async def slow_stream(server, request, body):
    return await stream(server, request, await good(server, request, body), pause_s=0.02)


async def stream_error(server, request, body):
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    error = json.dumps({"error": {"message": "engine died", "code": 500}})
    await response.write(f"data: {error}\n\ndata: [DONE]\n\n".encode())
    return response


async def hang(server, request, body):
    await asyncio.sleep(3600)


# -- what is asked, and what is the answer ------------------------------------------------------


def asked(prompt=(1, 2, 3), **settings):
    one = request(prompt, **settings)
    return replace(one, request_id=f"t/0@1/{one.seed}.0#0")


def expected(one):
    """What a good server answers: ids and finish."""
    ids, _, finish = dice(
        {
            "prompt": list(one.prompt_ids),
            "seed": one.seed,
            "max_tokens": one.sampling.max_tokens,
            "stop_token_ids": list(one.stop_ids),
            "top_k": one.sampling.top_k,
        }
    )
    return tuple(ids), finish
