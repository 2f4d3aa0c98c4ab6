"""``python -m benchmarks COMMAND``: the project's claims, reproduced."""

from trajectory.command import Command, main

COMMANDS = {
    "throughput": Command(
        "benchmarks.throughput:ThroughputConfig",
        "benchmarks.throughput:throughput",
        "generated tokens per second of an engine, by batch size",
    ),
}

if __name__ == "__main__":
    main("python -m benchmarks", COMMANDS)
