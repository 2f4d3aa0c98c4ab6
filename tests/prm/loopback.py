"""A server in a thread, on a real socket."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from prm.serve import ServeConfig, create_app


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
