"""Real `vllm serve` processes, and a small policy for them that calls the calculator."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch

from policy.tiny import make_tokenizer
from tests.agent.engines.tiny import make_llama
from trajectory.formats import format_call
from trajectory.records import ToolCall

CONTEXT = 512
START_S = 240
GENERATING = (
    "--served-model-name walker --max-num-seqs 32 --no-enable-chunked-prefill "
    f"--max-num-batched-tokens {4 * CONTEXT} --logprobs-mode processed_logprobs "
    "--generation-config vllm --enable-prompt-tokens-details --dtype float32"
)
"""Flags of a server that samples turns."""


def save_walker(folder: Path) -> None:
    """Save a random policy whose next token depends mostly on the last one.

    After the assistant's header it begins a call or an answer; both go on with digits and end
    somehow. It cannot calculate, but its episodes have several turns, and its attention matters
    to its log-probabilities.
    """
    tokenizer = make_tokenizer()
    model = make_llama(
        vocab_size=len(tokenizer), hidden_size=128, max_position_embeddings=2 * CONTEXT
    )
    call = format_call(ToolCall(name="calculator", arguments='{"expression": "X"}'))
    head, tail = call.split("X")
    head = f"\n{head}"
    follow = {
        "<|im_start|>assistant\n": {head: 0.7, "The": 0.3},
        head: dict.fromkeys("123", 1 / 3),
        "+": dict.fromkeys("123", 1 / 3),
        tail: {"<|im_end|>": 1.0},
        "The": {" answer": 1.0},
        " answer": {" is ": 1.0},
        " is ": dict.fromkeys("123", 1 / 3),
        **{digit: {"+": 0.3, tail: 0.4, "<|im_end|>": 0.3} for digit in "123"},
    }
    follow["\n<|im_start|>assistant\n"] = follow["<|im_start|>assistant\n"]
    known = tokenizer.get_vocab()
    with torch.no_grad():
        table = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.model.embed_tokens.weight.copy_(table * table.shape[1] ** 0.5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.05)
            layer.mlp.down_proj.weight.mul_(0.05)
        weight = 0.02 * torch.randn_like(model.lm_head.weight)  # no two tokens equally likely
        for last, successors in follow.items():
            for token, share in successors.items():
                logit = 10 + math.log(share)
                weight[known[token]] += logit * table[known[last]] / table.shape[1] ** 0.5
        model.lm_head.weight.copy_(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Serve:
    """One server process; it and its children are a process group of their own."""

    def __init__(self, folder: Path, log: Path, *, flags: str = GENERATING) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        flags = (
            f"--model {folder} --host 127.0.0.1 --port {port} --enforce-eager "
            f"--max-model-len {CONTEXT} --kv-cache-memory-bytes 64000000 "
            f"--disable-uvicorn-access-log {flags}"
        )
        environment = {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "OMP_NUM_THREADS": "1",
            # Each would bind its threads to the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                # What `vllm serve` runs; that command itself looks for a package named vllm, and
                # stops where vllm-cpu is installed.
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags.split()],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server did not start:\n{self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End it at once, as a power cut would; may be called twice."""
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
