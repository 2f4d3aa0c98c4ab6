import asyncio

import pytest

from agent.engines.base import EngineError
from agent.engines.scripted import Faults, ScriptedEngine
from benchmarks.feeding import RecordingEngine, busy_share, direct_feed
from benchmarks.throughput import random_requests


class Counting(ScriptedEngine):
    """Notes how many requests are in flight."""

    in_flight = most = 0

    async def generate(self, request):
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            return await super().generate(request)
        finally:
            self.in_flight -= 1


def test_direct_feed_keeps_exactly_the_concurrency_in_flight():
    engine = Counting(["x" * 500])
    requests = random_requests(20, vocabulary=100)
    feed = asyncio.run(direct_feed(engine, requests, concurrency=6))
    assert engine.most == 6
    assert engine.stats.requests == 20
    assert feed.generated_tokens == sum(r.sampling.max_tokens for r in requests)
    assert feed.tokens_per_second == pytest.approx(feed.generated_tokens / feed.seconds)


def test_the_recording_engine_keeps_answered_requests_and_passes_failures_on():
    recorder = RecordingEngine(ScriptedEngine(["abc"], faults=Faults(fail_at=frozenset({2}))))
    first, second, third = random_requests(3, vocabulary=100)

    async def main():
        await recorder.generate(first)
        with pytest.raises(EngineError, match="request 2"):
            await recorder.generate(second)
        await recorder.generate(third)

    asyncio.run(main())
    assert recorder.requests == [first, third]
    assert len(recorder.generations) == 2
    assert recorder.stats.requests == 3
    assert recorder.name == "scripted"


def test_the_busy_share_of_a_pipeline_that_dawdles_is_low():
    engine = ScriptedEngine(["x" * 500], faults=Faults(delay_s=0.02))

    async def pipeline(recorder):
        for request in random_requests(8, vocabulary=100):
            await recorder.generate(request)

    slow, direct = asyncio.run(busy_share(engine, pipeline, concurrency=8))
    assert slow.generated_tokens == direct.generated_tokens
    assert slow.tokens_per_second < 0.7 * direct.tokens_per_second
