#!/usr/bin/env bash
# GSM8K with real pretrained models on a CPU: labels by Qwen2.5-Coder-1.5B-Instruct with the python
# tool, PRMs from them, best-of-4; then reinforcement learning of SmolLM2-135M-Instruct, outcome
# beside PRM. Takes hours on two cores; every command resumes where it was stopped.
#   runs/real_gsm8k.sh GSM8K_FOLDER QWEN SMOLLM2 [FOLDER]
# GSM8K_FOLDER holds train.jsonl and test.jsonl (columns problem, answer, solution); QWEN and
# SMOLLM2 are hub ids or folders. PART=label, best or optimize runs only that part.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 qwen=$2 smollm=$3 out=${4:-runs/real}
engine=${ENGINE:-vllm} device=${DEVICE:-auto}
test_tasks=${TEST_TASKS:-24} rl_steps=${RL_STEPS:-20}
part=${PART:-all}
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
mkdir -p "$out"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

acting=(--policy "$qwen" --engine "$engine" --dtype bfloat16 --device "$device"
    --tools python --allow-unsafe-tools --temperature 0.8 --max-turn-tokens 200
    --max-context 1536 --max-steps 6 --concurrency "${CONCURRENCY:-32}")

if [[ $part == all || $part == label ]]; then
    run prm label --tasks "math:$data/test.jsonl" --num-tasks "$test_tasks" --samples 4 \
        --rollouts 4 "${acting[@]}" --out "$out/labels-test"
fi

if [[ $part == all || $part == best ]]; then
    # Few tasks are labelled, so every task is scored by a PRM trained on the other half.
    run python -m benchmarks folds --labels "$out/labels-test" --out "$out/folds"
    for fold in 0 1; do
        run prm train --labels "$out/folds/$fold-train" --model "$smollm" --epochs 3 \
            --step-tokens 2048 --batch-tokens 2048 --precision bfloat16 --device "$device" \
            --out "$out/prm-smollm2-$fold"
        run prm evaluate --prm "$out/prm-smollm2-$fold" --labels "$out/folds/$fold-test" \
            --device "$device"
        run prm score --prm "$out/prm-smollm2-$fold" --device "$device" \
            --trajectories "$out/folds/$fold-test/trajectories.jsonl" --out "$out/scores-$fold.jsonl"
    done
    cat "$out/scores-0.jsonl" "$out/scores-1.jsonl" >"$out/smollm2.jsonl"
    scores=(--scores "$out/smollm2.jsonl")
    if [[ ${LORA:-1} == 1 ]]; then
        for fold in 0 1; do
            run prm train --labels "$out/folds/$fold-train" --model "$qwen" --lora-rank 16 \
                --epochs 1 --step-tokens 512 --batch-tokens 512 --precision bfloat16 \
                --device "$device" --out "$out/prm-qwen-$fold"
            run prm score --prm "$out/prm-qwen-$fold" --device "$device" \
                --trajectories "$out/folds/$fold-test/trajectories.jsonl" \
                --out "$out/qwen-$fold.jsonl"
        done
        cat "$out/qwen-0.jsonl" "$out/qwen-1.jsonl" >"$out/qwen.jsonl"
        scores+=("$out/qwen.jsonl")
    fi
    run python -m benchmarks best-of-n --trajectories "$out/labels-test/trajectories.jsonl" \
        "${scores[@]}" --out "$out/best-of-4.json"
fi

if [[ $part == all || $part == optimize ]]; then
    # The policy is shown solutions with at most two calculator calls. Of other problems, which need
    # one call, the first 60 are labelled for the PRM. RL is on those among them that the policy ever
    # solved, as so small a model solves few; the last 120 are for the comparison.
    system="Solve the problem with the calculator, one step at a time. End with: The answer is N."
    demonstrate=(policy synthesize --tool calculator --system-prompt "$system")
    run "${demonstrate[@]}" --tasks "math:$data/train.jsonl" --max-calls 2 \
        --out "$out/demonstrations"
    head -n "${WARMUP_TASKS:-320}" "$out/demonstrations/trajectories.jsonl" >"$out/warmup.jsonl"
    for split in train test; do
        run "${demonstrate[@]}" --tasks "math:$data/$split.jsonl" --max-calls 1 \
            --out "$out/one-call-$split"
    done
    python - "$out/warmup.jsonl" "$out/short.jsonl" \
        "$out"/one-call-{train,test}/trajectories.jsonl <<'PYTHON'
import json
import sys

from trajectory.records import Trajectory
from trajectory.store import read_jsonl

shown = {t.task.task_id for t in read_jsonl(sys.argv[1], Trajectory)}
with open(sys.argv[2], "w") as sink:
    for path in sys.argv[3:]:
        for t in read_jsonl(path, Trajectory):
            if t.task.task_id not in shown:
                row = {"id": t.task.task_id, "problem": t.task.prompt, "answer": t.task.answer}
                sink.write(json.dumps(row) + "\n")
PYTHON
    playing=(--tools calculator --system-prompt "$system" --max-turn-tokens 96 --max-context 640
        --max-steps 5 --temperature 0.8 --device "$device")
    run policy warmup --data "$out/warmup.jsonl" --model "$smollm" --chat-format chatml \
        --epochs 1 --learning-rate 3e-4 --step-tokens 2048 --batch-tokens 2048 \
        --precision bfloat16 --out "$out/warmup"
    run prm label --tasks "math:$out/short.jsonl" "${playing[@]}" --dtype bfloat16 \
        --num-tasks 60 --rollouts 2 --policy "$out/warmup" --out "$out/labels-warmup"
    run prm train --labels "$out/labels-warmup" --model "$out/warmup" --epochs 2 \
        --step-tokens 2048 --batch-tokens 2048 --precision bfloat16 --device "$device" \
        --out "$out/prm-warmup"
    python - "$out/labels-warmup/evidence.jsonl" "$out/short.jsonl" "$out/solvable.jsonl" <<'PYTHON'
import json
import sys

solved = {row["task_id"] for row in map(json.loads, open(sys.argv[1])) if row["outcome"] == 1.0}
with open(sys.argv[3], "w") as sink:
    sink.writelines(line for line in open(sys.argv[2]) if json.loads(line)["id"] in solved)
PYTHON
    for arm in outcome prm; do
        flags=()
        [ "$arm" = prm ] && flags=(--prm "$out/prm-warmup")
        run policy optimize --tasks "math:$out/solvable.jsonl" "${playing[@]}" \
            --policy "$out/warmup" "${flags[@]}" --tasks-per-step "${TASKS_PER_STEP:-3}" \
            --group-size "${GROUP_SIZE:-4}" --steps "$rl_steps" --learning-rate 2e-5 \
            --warmup-steps 2 --batch-tokens 2048 --precision bfloat16 --save-every 2 \
            --out "$out/rl/$arm-seed0"
    done
    for name in warmup outcome prm; do
        policy="$out/rl/$name-seed0/policy"
        [ "$name" = warmup ] && policy="$out/warmup"
        evaluating=(policy evaluate "${playing[@]}" --dtype bfloat16 --policy "$policy")
        run "${evaluating[@]}" --tasks "math:$out/solvable.jsonl" --samples 8 \
            --out "$out/rl/$name-seed0-pool"
        run "${evaluating[@]}" --tasks "math:$out/short.jsonl" --first-task 137 --num-tasks 120 \
            --samples "${RL_TEST_SAMPLES:-1}" --out "$out/rl/$name-seed0-test"
    done
    run python -m benchmarks curves --run "$out/rl" --out docs/results/real_gsm8k_curves
fi
