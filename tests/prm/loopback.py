"""A server in a thread, on a real socket, and what asks it."""

import json
import random
import socket
import threading
import time
from contextlib import contextmanager

import urllib3
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from prm.serve import ServeConfig, create_app
from tests.prm.synthetic import make_trajectory

NO_RETRY = urllib3.PoolManager(maxsize=64, retries=False, timeout=60)


@contextmanager
def serving(scorer, *, token=None, **limits):
    """Serve a scorer on loopback; gives the URL."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    app = create_app(scorer, ServeConfig(prm="unused", **limits), token=token)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def runs(count, seed=0):
    """Trajectories of up to six steps."""
    rng = random.Random(seed)
    marks = ["".join(rng.choice("+-") for _ in range(rng.randint(0, 5))) for _ in range(count)]
    return [make_trajectory(m, task=f"r{i}") for i, m in enumerate(marks)]


def post(url, body, **headers):
    """Ask for scores."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    return NO_RETRY.request("POST", f"{url}/score", body=data, headers=headers)


def metrics_of(url):
    """What the server counts, by name and labels."""
    text = NO_RETRY.request("GET", f"{url}/metrics").data.decode()
    return {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
