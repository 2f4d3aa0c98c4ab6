"""The ``prm`` command: label, train, score, evaluate, serve, view."""

from __future__ import annotations

from trajectory.command import Command
from trajectory.command import main as run_command

COMMANDS = {
    "label": Command(
        config_class="labeling.config:LabelConfig",
        function="labeling.run:label",
        help="Roll the policy out from every step and turn the counts into labels.",
    ),
    "merge": Command(
        config_class="labeling.merge:MergeConfig",
        function="labeling.merge:merge",
        help="Join the parts of a labelling run that was split with --shard.",
    ),
    "judge": Command(
        config_class="labeling.judge_run:JudgeConfig",
        function="labeling.judge_run:judge",
        help="Ask a language model whether each step was good, neutral or bad.",
    ),
    "consensus": Command(
        config_class="labeling.consensus_run:ConsensusConfig",
        function="labeling.consensus_run:consensus",
        help="Keep the labels on which rollouts, judge and execution agree, and report the rest.",
    ),
    "train": Command(
        config_class="prm.train:TrainConfig",
        function="prm.train:train",
        help="Train a process reward model from labels.",
    ),
    "score": Command(
        config_class="prm.score:ScoreConfig",
        function="prm.score:score",
        help="Score every step of trajectories with a process reward model.",
    ),
    "evaluate": Command(
        config_class="prm.evaluate:EvaluateConfig",
        function="prm.evaluate:evaluate",
        help="Measure a process reward model on held-out tasks.",
    ),
    "serve": Command(
        config_class="prm.serve:ServeConfig",
        function="prm.serve:serve",
        help="Serve a process reward model over HTTP.",
    ),
    "view": Command(
        config_class="labeling.view:ViewConfig",
        function="labeling.view:view",
        help="Make a page to read labelled trajectories with, in any browser.",
    ),
}


def main() -> None:
    """Run the command line."""
    run_command("prm", COMMANDS)


if __name__ == "__main__":
    main()
