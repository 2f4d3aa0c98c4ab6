#!/usr/bin/env bash
# The main job on the embedded policy: synthesize, warm up, label, train a PRM, optimize with it.
# Every command is printed before it runs; an interrupted demo continues where it stopped.
#   runs/demo.sh [FOLDER]        default: runs/demo
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/demo}
test_tasks=500
# Episodes take about 120 tokens; one that babbles on would hold up its whole batch.
limit=(--max-context 512)
# Small batches of rows of like length: on a CPU, less padding beats larger products.
small=(--step-tokens 2048 --batch-tokens 1024)
mkdir -p "$out"

# run STAGE COMMAND...: print the command, run it, keep its seconds unless it had been done before
run() {
    local stage=$1 begin=$SECONDS
    shift
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
    if ! grep -q "^$stage	" "$out/seconds.tsv" 2>/dev/null; then
        printf '%s\t%s\n' "$stage" $((SECONDS - begin)) >>"$out/seconds.tsv"
    fi
}

# The demonstrator slips at hard operations only (--contrast 1), so the policy's slips can be read in
# the text; slips that come from too short a warm-up cannot (docs/results/demo.md).
run synthesize policy synthesize --tasks arithmetic --num-tasks 3000 --contrast 1 \
    --out "$out/demonstrations"
run warmup policy warmup --data "$out/demonstrations" --model tiny --epochs 4 "${small[@]}" \
    --out "$out/warmup"
# Many states measured once teach a PRM more than few measured often, at the same cost
# (docs/results/demo.md), because the loss is the likelihood of the counts. With one rollout per
# state, counting it for later states too would only tie their errors together.
run label prm label --tasks arithmetic --first-task 3000 --num-tasks 1700 --same-state never \
    --policy "$out/warmup" --rollouts 1 "${limit[@]}" --out "$out/labels"
run train prm train --labels "$out/labels" --model "$out/warmup" --epochs 3 "${small[@]}" \
    --out "$out/prm"
run exact prm label --tasks arithmetic --split test --first-task 1000 --num-tasks 28 \
    --policy "$out/warmup" --rollouts 64 "${limit[@]}" --out "$out/exact"
run held_out prm label --tasks arithmetic --split test --first-task 2000 --num-tasks 500 \
    --policy "$out/warmup" --rollouts 1 "${limit[@]}" --out "$out/held-out"
run score prm score --prm "$out/prm" --trajectories "$out/held-out/trajectories.jsonl" \
    --out "$out/scores.jsonl"
run measure prm evaluate --prm "$out/prm" --labels "$out/exact"
run measure_outcomes prm evaluate --prm "$out/prm" --labels "$out/held-out" \
    --out "$out/held-out/evaluation"
run optimize policy optimize --policy "$out/warmup" --prm "$out/prm" --tasks arithmetic \
    --steps 20 --batch-tokens 1024 "${limit[@]}" --out "$out/optimized"
run before policy evaluate --policy "$out/warmup" --tasks arithmetic --num-tasks $test_tasks \
    --samples 1 "${limit[@]}" --out "$out/before"
run after policy evaluate --policy "$out/optimized/policy" --tasks arithmetic \
    --num-tasks $test_tasks --samples 1 "${limit[@]}" --out "$out/after"
run report python -m benchmarks demo --run "$out"
