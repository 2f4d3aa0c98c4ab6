"""Tells an episode that broke from an engine or tool that is dead.

A failed end is held back until the part that broke is seen working again: then it was that
episode's misfortune and counts. If the part never works again, the failures held back are dropped,
so that a resumed run repeats those episodes instead of finding them recorded as failed.
"""

from __future__ import annotations

from labeling.jobs import Job
from trajectory.records import StopReason, Trajectory

_FEWEST = 16
"""Failures since a part last worked below which it is not taken for dead while work is left."""
_OWNERS = 8
"""Different tasks or trajectories that a tool must fail for; one broken state proves nothing."""


class FailureWatch:
    """Holds failed ends back.

    Parameters
    ----------
    concurrency : int
        Episodes alive at a time; that many can fail at once for one reason.
    """

    def __init__(self, concurrency: int) -> None:
        self._limit = max(_FEWEST, 2 * concurrency)
        self._engine: list[tuple[Job, Trajectory]] = []
        self._tool: list[tuple[Job, Trajectory]] = []

    def see(self, job: Job, ended: Trajectory) -> list[tuple[Job, Trajectory]]:
        """Take the end of an episode; return the ends that are now certain, in order."""
        if ended.stop is StopReason.ENGINE_FAILURE:
            self._engine.append((job, ended))
            return []
        certain, self._engine = self._engine, []
        if ended.stop is StopReason.TOOL_FAILURE:
            self._tool.append((job, ended))
            return certain
        new_steps = ended.steps[job.state[1] :]
        if any(o.error is None for step in new_steps for o in step.observations):
            certain, self._tool = self._tool + certain, []
        return [*certain, (job, ended)]

    def verdict(self) -> str | None:
        """Return what is dead, as a sentence; None while there is hope."""
        if len(self._engine) >= self._limit:
            return _sentence("the engine", self._engine)
        owners = {job.state[0] for job, _ in self._tool}
        if len(self._tool) >= self._limit and len(owners) >= _OWNERS:
            return _sentence("a tool", self._tool)
        return None

    def last_verdict(self, *, ever_worked: bool) -> str | None:
        """Return what is dead now that no work is left, as a sentence, or None.

        Parameters
        ----------
        ever_worked : bool
            Whether any episode of the run ended well; if none did, the tool was never there.
        """
        if self._engine:
            return _sentence("the engine", self._engine)
        if self._tool and not ever_worked:
            return _sentence("a tool", self._tool)
        return None

    def rest(self) -> list[tuple[Job, Trajectory]]:
        """Return what is still held back and count it as misfortune."""
        rest, self._engine, self._tool = self._tool + self._engine, [], []
        return rest


def _sentence(part: str, failures: list[tuple[Job, Trajectory]]) -> str:
    """Say what stopped the run."""
    cause = failures[-1][1].meta.get("failure", "no cause given")
    return (
        f"{part} stopped working: {len(failures)} episodes have failed since it last worked "
        f"({cause}); what ended before is saved: repair it and run the same command again to resume"
    )
