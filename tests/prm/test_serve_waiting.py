"""Requests that wait at `prm serve`: too many of them, and clients that leave."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prm.remote import RemoteScorer
from prm.score import Scorer
from tests.prm.loopback import metrics_of, post, runs, serving
from trajectory.codec import to_json
from trajectory.errors import InputError


@pytest.fixture(scope="module")
def scorer(prm_folder):
    return Scorer.load(prm_folder, device="cpu")


class Held(Scorer):
    """A scorer that waits until it is let go."""

    def __init__(self, scorer):
        super().__init__(scorer.checkpoint, torch.device("cpu"))
        self.go, self.begun = threading.Event(), threading.Event()
        self.scored = []

    def margins(self, rendered):
        self.begun.set()
        self.scored += [len(r.input_ids) for r in rendered]
        assert self.go.wait(30)
        return super().margins(rendered)


def test_a_full_queue_is_429_and_the_client_comes_back(scorer):
    held = Held(scorer)
    body = {"trajectories": [to_json(runs(1)[0])]}
    with serving(held, max_waiting=1) as url, ThreadPoolExecutor(3) as pool:
        first = pool.submit(post, url, body)
        assert held.begun.wait(30)
        second = pool.submit(post, url, body)
        while metrics_of(url)["prm_waiting_trajectories",] < 1:
            pass
        refused = post(url, body)
        assert refused.status == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "1 trajectories are waiting already" in refused.json()["detail"]
        with pytest.raises(InputError, match="answered 429"):
            RemoteScorer(url, retries=0).score(runs(1))
        patient = pool.submit(RemoteScorer(url).score, runs(1))
        while metrics_of(url)["prm_requests_total", "/score", "429"] < 3:
            pass
        held.go.set()
        assert (first.result(30).status, second.result(30).status) == (200, 200)
        assert patient.result(30) == scorer.score(runs(1))


def wait_for(url, value, *name):
    """Wait until the server counts this many, at most half a minute."""
    end = time.monotonic() + 30
    while metrics_of(url).get(name) != value:
        assert time.monotonic() < end, f"{name} is not {value}"


def test_a_client_that_leaves_while_it_waits_is_not_scored(scorer):
    held, gone = Held(scorer), runs(3, seed=9)
    with serving(held, max_waiting=3) as url, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, url, {"trajectories": [to_json(runs(1)[0])]})
        assert held.begun.wait(30)
        body = json.dumps({"trajectories": [to_json(t) for t in gone]}).encode()
        address = url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as client:
            client.sendall(
                b"POST /score HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_for(url, 3, "prm_waiting_trajectories")
            assert post(url, {"trajectories": [to_json(gone[0])]}).status == 429
        wait_for(url, 1, "prm_requests_total", "/score", "499")
        counted = metrics_of(url)
        assert counted["prm_dropped_trajectories_total",] == 3
        assert counted["prm_waiting_trajectories",] == 0
        second = pool.submit(post, url, {"trajectories": [to_json(runs(2)[1])]})
        wait_for(url, 1, "prm_waiting_trajectories")
        held.go.set()
        assert (first.result(30).status, second.result(30).status) == (200, 200)
    assert held.scored == [len(r.input_ids) for r in scorer.render(runs(2))]
