"""``python -m benchmarks COMMAND``: the project's claims, reproduced."""

from trajectory.command import Command, main

COMMANDS = {
    "throughput": Command(
        "benchmarks.throughput:ThroughputConfig",
        "benchmarks.throughput:throughput",
        "generated tokens per second of an engine, by batch size",
    ),
    "feeding": Command(
        "benchmarks.busy:BusyConfig",
        "benchmarks.busy:feeding",
        "how busy labelling keeps its engine, and what an optimization step takes",
    ),
    "labels": Command(
        "benchmarks.labels:LabelStudyConfig",
        "benchmarks.labels:study",
        "label error against tokens, for every strategy and estimator",
    ),
    "branching": Command(
        "benchmarks.branching:BranchingConfig",
        "benchmarks.branching:branching",
        "restoring a tool state by branching, beside replaying it",
    ),
    "demo": Command(
        "benchmarks.demo:DemoConfig",
        "benchmarks.demo:report",
        "the numbers of a demo run as one table and report.json",
    ),
    "best-of-n": Command(
        "benchmarks.best_of_n:BestOfNConfig",
        "benchmarks.best_of_n:compare",
        "choosing among several answers by PRM, beside vote and mean",
    ),
    "folds": Command(
        "benchmarks.folds:FoldsConfig",
        "benchmarks.folds:split",
        "a label folder split by task, for out-of-fold scores",
    ),
    "heads": Command(
        "benchmarks.heads:HeadsConfig",
        "benchmarks.heads:compare",
        "heads, targets and rollouts per state at equal tokens, against exact values",
    ),
    "curves": Command(
        "benchmarks.curves:CurvesConfig",
        "benchmarks.curves:compare",
        "learning curves of several arms over seeds",
    ),
    "bon-pools": Command(
        "benchmarks.bon_pools:BonPoolsConfig",
        "benchmarks.bon_pools:compare",
        "best-of-N from the published step scores of other reward models",
    ),
    "small-base": Command(
        "benchmarks.small_base:SmallBaseConfig",
        "benchmarks.small_base:make",
        "a small base to train reward models from on a CPU",
    ),
    "public-split": Command(
        "benchmarks.public_split:PublicSplitConfig",
        "benchmarks.public_split:split",
        "a public data set parted by problem, without the problems of another",
    ),
    "sql-gold": Command(
        "benchmarks.sql_gold:SqlGoldConfig",
        "benchmarks.sql_gold:check",
        "right and wrong queries before the checker of sql tasks",
    ),
    "code-gold": Command(
        "benchmarks.code_gold:CodeGoldConfig",
        "benchmarks.code_gold:check",
        "right and wrong solutions before the hidden tests of code tasks",
    ),
    "peers": Command(
        "benchmarks.peers:PeersConfig",
        "benchmarks.peers:compare",
        "training and scoring beside TRL's, and scoring of growing episodes",
    ),
    "serving": Command(
        "benchmarks.serving:ServingConfig",
        "benchmarks.serving:compare",
        "prm serve under many clients, beside scoring in process",
    ),
}

if __name__ == "__main__":
    main("python -m benchmarks", COMMANDS)
