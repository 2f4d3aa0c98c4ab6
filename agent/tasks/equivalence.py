"""The child side of `agent.tasks.verifier`: compares answers with math-verify, one per line.

Started by path, it imports nothing of this project. It answers each line ``["gold", "answer"]``
with ``true`` or ``false``. Symbolic algebra on a hostile answer may hang inside C code, where no
Python handler runs, so a kernel timer of CPU time kills the process (SIGPROF) at the limit.
"""

import json
import logging
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_BYTES = 4 * 2**30


def equivalent(gold: str, answer: str) -> bool:
    """Tell whether two LaTeX or plain expressions mean the same."""
    parsed_gold, parsed_answer = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)
    )
    return bool(verify(parsed_gold, parsed_answer, timeout_seconds=None))


def main() -> None:
    """Answer lines until the parent closes the pipe; the argument is the limit in seconds."""
    limit_s = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        same = equivalent(gold, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(same), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
