"""A small SandboxFusion server: its `/run_code`, run for real, and the ways such a server fails.

It isolates nothing, like the original with `isolation: none`: only for the tests' own snippets.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FusionServer(ThreadingHTTPServer):
    """Serves on a free loopback port while the `with` block lasts."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *, reads_while_waiting=True, python=sys.executable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.reads_while_waiting = reads_while_waiting
        self.python = python
        self.faults = []
        """How the next requests fail, first to last; then the server works."""
        self.requests = []
        """Bodies received."""
        self.running = set()
        self.stopping = threading.Event()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away
            super().handle_error(request, client_address)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.shutdown()
        for process in list(self.running):
            kill(process)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang":
            self.server.stopping.wait(60)
        elif fault == "reset":
            self.connection.close()
        elif isinstance(fault, int):
            self.reply(fault, {"detail": "something is wrong"})
        elif fault == "truncated":
            self.reply(200, run_code(self.server, body), cut=40)
        elif isinstance(fault, dict):
            self.reply(200, fault)
        elif fault == "html":
            self.send(200, b"<html>It works!</html>")
        elif fault is not None:
            raise AssertionError(fault)
        elif self.path != "/run_code":
            self.reply(404, {"detail": "Not Found"})
        else:
            self.reply(200, run_code(self.server, body))

    def reply(self, status, content, *, cut=0):
        self.send(status, json.dumps(content).encode(), cut=cut)

    def send(self, status, body, *, cut=0):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])

    def log_message(self, *_):
        pass


def run_code(server, body):
    """What the original answers: the fields of its RunCodeResponse."""
    assert body["language"] == "python"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name, content in body.get("files", {}).items():
            Path(folder, name).write_bytes(base64.b64decode(content))
        program = Path(folder, "tmpprogram.py")
        program.write_text(body["code"])
        result = run_command(server, [server.python, program], folder, body["run_timeout"])
    failed = result["status"] == "TimeLimitExceeded" or result["return_code"] != 0
    return {
        "status": "Failed" if failed else "Success",
        "message": "",
        "compile_result": None,
        "run_result": result,
        "executor_pod_name": None,
        "files": {},
    }


def run_command(server, command, folder, seconds):
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    server.running.add(process)
    try:
        if server.reads_while_waiting:
            out, err = process.communicate(timeout=seconds)
        else:  # as the original did: the program stops at a full pipe
            process.wait(seconds)
            out, err = process.communicate()
        status, code = "Finished", process.returncode
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        status, code = "TimeLimitExceeded", None
    finally:
        kill(process)
        server.running.discard(process)
    return {
        "status": status,
        "execution_time": time.monotonic() - started,
        "return_code": code,
        "stdout": out.decode(errors="replace"),
        "stderr": err.decode(errors="replace"),
    }


def kill(process):
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    with FusionServer() as standalone:
        print(standalone.url, flush=True)
        threading.Event().wait()
