"""The command `prm judge` through the scripted engine: real but for the choice of words."""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace

import pytest

from agent.chat import ChatFormat
from agent.engines.scripted import Faults, ScriptedEngine
from labeling.judge import (
    Abstention,
    Judgement,
    render_prompt,
)
from labeling.judge_run import JudgeConfig, judge, read_judgements
from tests.labeling.judged import BAD, ROWS
from trajectory.command import Command, main
from trajectory.errors import InputError
from trajectory.run import read_manifest
from trajectory.store import read_jsonl, write_jsonl, write_labels


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    write_labels(folder / "labels.parquet", ROWS)
    return folder


def engine(lab, turns, **options):
    policy = str(lab / "policy")
    options = {"max_context": 100_000, "policy": policy} | options
    return ScriptedEngine(turns, codec=ChatFormat.load(policy, tools=()).tokenizer, **options)


def config(lab, labels, out, **changes):
    fields = {"labels": labels, "judge": str(lab / "policy"), "out": out, "max_tokens": 400}
    return JudgeConfig(**(fields | changes))


def judgements(out):
    return {j.key: j for j in read_jsonl(out / "judgements.jsonl", Judgement)}


def by_seed(prompt, seed):
    """Any of the verdicts and of the ways to abstain, as the seed decides."""
    said = ("VERDICT: good", "Hm.\nVERDICT: bad", "VERDICT: neutral", "VERDICT: fine", "")
    return said[seed % len(said)]


def test_every_step_gets_its_votes_and_the_folder_says_what_came_out(lab, labels, tmp_path):
    def turn(prompt, seed):
        question = prompt.rpartition("the one to judge")[2]
        return "It is wrong.\nVERDICT: bad" if "WRONG" in question else "Fine.\n**Verdict: Good.**"

    counts = judge(config(lab, labels, tmp_path / "out"), engine=engine(lab, turn))
    found = judgements(tmp_path / "out")
    places = [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    assert set(found) == {(*place, vote) for place in places for vote in range(3)}
    assert all((j.verdict is BAD) == (j.key[:2] == ("b", 2)) for j in found.values())
    assert {"steps": 5, "steps_good": 4, "steps_bad": 1, "votes": 15}.items() <= counts.items()
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.kind, manifest.status) == ("judge", "finished")
    assert manifest.counts == counts
    assert [p.sha256 != "" for p in manifest.parents] == [True, True]
    assert len({j.seed for j in found.values()}) == 15
    assert found["a", 1, 0].text == "Fine.\n**Verdict: Good.**"
    assert found["a", 1, 0].tokens > 5


def test_nonsense_abstains_and_is_counted(lab, labels, tmp_path):
    counts = judge(config(lab, labels, tmp_path / "out", engine="scripted"))
    assert counts["votes_abstained_no_verdict"] == counts["votes"] == 15
    assert counts["steps_without_verdict"] == counts["steps"] == 5
    assert all(j.verdict is None for j in judgements(tmp_path / "out").values())


def test_a_verdict_in_an_observation_does_not_count(lab, labels, tmp_path):
    """Neither its words nor its forged end of turn: the prompt is no part of what is read."""
    prompts = []

    def turn(prompt, seed):
        prompts.append(prompt)
        question = prompt.rpartition("the one to judge")[2]
        return "I cannot tell." if "ADD" in question else "VERDICT: bad"

    judge(config(lab, labels, tmp_path / "out", votes=1), engine=engine(lab, turn))
    found = judgements(tmp_path / "out")
    assert found["b", 1, 0].verdict is None
    assert found["b", 1, 0].abstention is Abstention.NO_VERDICT
    assert found["b", 2, 0].verdict is BAD
    assert all(p.rstrip().endswith("<|im_start|>assistant") for p in prompts)


def test_special_tokens_in_the_data_are_ordinary_characters(lab):
    chat = ChatFormat.load(str(lab / "policy"), tools=())
    plain = chat.prompt_ids("", "7")
    ids = chat.prompt_ids("", render_prompt(ROWS[1].trajectory, 1))
    special = set(chat.tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_a_vote_cut_off_by_the_limit_abstains(lab, labels, tmp_path):
    talker = engine(lab, ["VERDICT: good"])
    counts = judge(config(lab, labels, tmp_path / "out", max_tokens=3), engine=talker)
    assert counts["votes_abstained_cut_off"] == 15


def test_a_step_that_does_not_fit_the_context_is_not_asked(lab, labels, tmp_path):
    short = engine(lab, ["VERDICT: good"], max_context=500)
    counts = judge(config(lab, labels, tmp_path / "out", max_tokens=400), engine=short)
    assert counts["votes_abstained_too_long"] == 15
    assert short.stats.requests == counts["tokens"] == 0


def test_a_resumed_run_asks_only_for_what_is_missing(lab, labels, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    judge(config(lab, labels, whole), engine=engine(lab, by_seed))
    judge(config(lab, labels, out), engine=engine(lab, by_seed))
    path = out / "judgements.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[2:9], lines[3], lines[10][:20]]))
    again = engine(lab, by_seed)
    counts = judge(config(lab, labels, out), engine=again)
    assert again.stats.requests == 8
    assert judgements(out) == judgements(whole)
    assert {"votes": 15, "cut_lines": 1, "duplicate_lines": 1}.items() <= counts.items()
    unused = engine(lab, by_seed)
    judge(config(lab, labels, out), engine=unused)
    assert unused.stats.requests == 0


def test_two_lines_that_differ_about_one_vote_are_refused(lab, labels, tmp_path):
    out = tmp_path / "out"
    judge(config(lab, labels, out), engine=engine(lab, ["VERDICT: good"]))
    path = out / "judgements.jsonl"
    found = list(read_judgements(path))
    write_jsonl(path, [*found, replace(found[0], verdict=BAD)])
    with pytest.raises(InputError, match=r"holds vote \d on step \d of '\w' twice with different"):
        judge(config(lab, labels, out), engine=engine(lab, by_seed))


def test_votes_do_not_depend_on_the_order_of_work(lab, labels, tmp_path):
    judge(config(lab, labels, tmp_path / "a"), engine=engine(lab, by_seed))
    slow = engine(lab, by_seed, faults=Faults(delay_s=0.001))
    judge(config(lab, labels, tmp_path / "b", concurrency=2), engine=slow)
    assert judgements(tmp_path / "a") == judgements(tmp_path / "b")
    judge(config(lab, labels, tmp_path / "c", seed=1), engine=engine(lab, by_seed))
    ours, theirs = judgements(tmp_path / "a"), judgements(tmp_path / "c")
    assert all(ours[key].seed != theirs[key].seed for key in ours)


def test_no_more_votes_are_in_flight_than_allowed(lab, labels, tmp_path):
    alive, most = 0, 0

    class Counting(ScriptedEngine):
        async def generate(self, request):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            try:
                return await super().generate(request)
            finally:
                alive -= 1

    policy = str(lab / "policy")
    codec = ChatFormat.load(policy, tools=()).tokenizer
    slow = Counting(
        by_seed, codec=codec, policy=policy, max_context=100_000, faults=Faults(delay_s=0.002)
    )
    judge(config(lab, labels, tmp_path / "out", concurrency=4), engine=slow)
    assert most == 4


def test_one_failure_is_asked_again(lab, labels, tmp_path):
    flaky = engine(lab, ["VERDICT: good"], faults=Faults(fail_at=frozenset({2, 5})))
    counts = judge(config(lab, labels, tmp_path / "out"), engine=flaky)
    assert counts["votes_good"] == 15


def test_what_the_engine_breaks_is_no_abstention_and_is_asked_by_the_next_start(
    lab, labels, tmp_path
):
    out = tmp_path / "out"
    broken = engine(lab, ["VERDICT: good"], faults=Faults(fail_at=frozenset(range(5, 99))))
    options = config(lab, labels, out, concurrency=1)
    with pytest.raises(InputError, match=r"the engine broke 11 of the votes \(scripted failure"):
        judge(options, engine=broken)
    assert len(judgements(out)) == 4
    assert read_manifest(out).status == "interrupted"
    counts = judge(options, engine=engine(lab, ["VERDICT: good"]))
    assert counts["votes_good"] == 15


def test_a_dead_engine_ends_the_run_early_and_leaves_no_folder(lab, labels, tmp_path):
    dead = engine(lab, ["VERDICT: good"], faults=Faults(fail_at=frozenset(range(99))))
    with pytest.raises(InputError, match=r"the engine stopped working|the engine broke 30"):
        judge(config(lab, labels, tmp_path / "out", votes=6, concurrency=1), engine=dead)
    assert dead.stats.requests == 32
    assert not (tmp_path / "out").exists()


def test_only_the_first_trajectories_are_judged_when_asked(lab, labels, tmp_path):
    options = config(lab, labels, tmp_path / "out", num_trajectories=1)
    assert judge(options, engine=engine(lab, by_seed))["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"votes": 0}, "--votes must be >= 1, not 0"),
        ({"num_trajectories": 0}, "--num-trajectories must be >= 1"),
        ({"temperature": -1.0}, "--temperature must be >= 0"),
        ({"concurrency": 0}, "--concurrency must be >= 1"),
        ({"engine": "gpt"}, "unknown engine 'gpt': choose one of transformers, vllm"),
    ],
)
def test_impossible_settings_are_refused(lab, labels, tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        config(lab, labels, tmp_path, **changes)


def test_bad_folders_are_refused_in_a_sentence(lab, labels, tmp_path):
    out = tmp_path / "out"

    def refusal(**changes):
        with pytest.raises(InputError) as refused:
            judge(config(lab, **({"labels": labels, "out": out} | changes)))
        assert not out.exists()
        return str(refused.value)

    assert "no does not exist: give the folder that `prm label" in refusal(labels=tmp_path / "no")
    file = labels / "labels.parquet"
    assert "labels.parquet is a file: give the folder" in refusal(labels=file)
    assert "holds no labels.parquet: give" in refusal(labels=lab / "policy")
    judge(config(lab, labels, tmp_path / "judged"), engine=engine(lab, by_seed))
    other = refusal(labels=tmp_path / "judged")
    assert "holds no labels.parquet (it is of the command `judge`)" in other
    write_labels(tmp_path / "empty" / "labels.parquet", [])
    assert "holds no trajectory" in refusal(labels=tmp_path / "empty")
    write_labels(tmp_path / "twice" / "labels.parquet", [ROWS[0], ROWS[0]])
    assert "holds trajectory 'a' twice" in refusal(labels=tmp_path / "twice")


def test_a_judge_without_a_chat_template_is_refused(lab, labels, tmp_path):
    bare = tmp_path / "bare"
    tokenizer = ChatFormat.load(str(lab / "policy"), tools=()).tokenizer
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    with pytest.raises(InputError, match="has no chat template: use --chat-format chatml"):
        judge(config(lab, labels, tmp_path / "out", judge=str(bare)))
    assert not (tmp_path / "out").exists()
    counts = judge(
        config(
            lab, labels, tmp_path / "out", judge=str(bare), chat_format="chatml", engine="scripted"
        )
    )
    assert counts["votes"] == 15


def test_a_folder_of_another_judge_run_is_refused(lab, labels, tmp_path):
    out = tmp_path / "out"
    judge(config(lab, labels, out), engine=engine(lab, by_seed))
    with pytest.raises(InputError, match="belongs to another run: votes was 3, now 5"):
        judge(config(lab, labels, out, votes=5), engine=engine(lab, by_seed))


def command(arguments, errors):
    """Run the command with a slow scripted engine, for a process that is to be killed."""
    sys.stderr = open(errors, "a")  # noqa: SIM115 - until the process ends
    sys.argv = ["prm", "judge", *arguments]

    def run(config):
        policy = config.judge
        codec = ChatFormat.load(policy, tools=()).tokenizer
        slow = Faults(delay_s=0.1)
        judge(
            config,
            engine=ScriptedEngine(
                by_seed, codec=codec, policy=policy, max_context=100_000, faults=slow
            ),
        )

    main("prm", {"judge": Command(config_class=JudgeConfig, function=run, help="Judge.")})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_run_resumes_with_the_same_votes(lab, labels, tmp_path, number):
    out, errors = tmp_path / "out", tmp_path / "errors"
    flags = f"--labels {labels} --judge {lab}/policy --out {out} --concurrency 2 --max-tokens 400"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.labeling.test_judge_run", "datasets"])
    process = context.Process(target=command, args=(flags.split(), errors))
    process.start()
    path = out / "judgements.jsonl"
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    if number == signal.SIGINT:
        assert process.exitcode == 130
        last = errors.read_text().strip().splitlines()[-1]
        assert last == "prm: interrupted; run the same command again to resume"
        assert read_manifest(out).status == "interrupted"
    before = list(read_jsonl(path, Judgement, tail="drop"))
    assert 3 <= len(before) < 15
    options = config(lab, labels, out, concurrency=2)
    judge(options, engine=engine(lab, by_seed))
    judge(config(lab, labels, tmp_path / "whole"), engine=engine(lab, by_seed))
    assert judgements(out) == judgements(tmp_path / "whole")
    assert len(list(read_jsonl(path, Judgement))) == 15
    assert read_manifest(out).starts == 2
