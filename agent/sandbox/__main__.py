"""``python -m agent.sandbox COMMAND``: what a sandbox offers, whether it holds, how fast it is."""

from trajectory.command import Command, main

COMMANDS = {
    "doctor": Command(
        "agent.sandbox.doctor:DoctorConfig",
        "agent.sandbox.doctor:doctor",
        "which isolation this machine offers, by trying forbidden things",
    ),
    "check": Command(
        "agent.sandbox.check:CheckConfig",
        "agent.sandbox.check:check",
        "hostile inputs against a backend: did each end as expected?",
    ),
    "bench": Command(
        "agent.sandbox.bench:BenchConfig",
        "agent.sandbox.bench:bench",
        "latency, throughput and memory of a backend",
    ),
    "soak": Command(
        "agent.sandbox.soak:SoakConfig",
        "agent.sandbox.soak:soak",
        "many mixed calls with kills in between: was any lost?",
    ),
}

if __name__ == "__main__":
    main("python -m agent.sandbox", COMMANDS)
