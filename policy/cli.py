"""The console script ``policy``."""

from __future__ import annotations

from trajectory import command

COMMANDS = {
    "synthesize": command.Command(
        "policy.synthesize:SynthesizeConfig",
        "policy.synthesize:synthesize",
        "Turn solutions into interleaved tool-using trajectories.",
    ),
    "warmup": command.Command(
        "policy.warmup:WarmupConfig",
        "policy.warmup:warmup",
        "Fine-tune a policy on trajectories, or train the embedded one from scratch.",
    ),
    "optimize": command.Command(
        "policy.optimize:OptimizeConfig",
        "policy.optimize:optimize",
        "Improve a policy by reinforcement learning, with a PRM or without.",
    ),
    "evaluate": command.Command(
        "policy.evaluate:EvaluateConfig",
        "policy.evaluate:evaluate",
        "Measure a policy's accuracy, tokens and tool use.",
    ),
}


def main() -> None:
    """Run the command that the arguments name."""
    command.main("policy", COMMANDS)


if __name__ == "__main__":
    main()
