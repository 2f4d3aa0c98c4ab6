#!/usr/bin/env bash
# A reward model from PRM800K phase 1 on one GPU (LoRA), measured on ProcessBench, PRMBench and
# AgentProcessBench beside a control with shuffled labels. Problems of ProcessBench are left out of
# training; `prm evaluate` leaves out what a model was trained on, and counts it.
#   runs/gpu_prm800k.sh DATA [FOLDER]
# DATA holds prm800k_phase1/, processbench/, prmbench/ and agentprocessbench/. BASE is a hub id or
# folder, DEVICE a torch device (cpu for a rehearsal with a small base).
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 out=${2:-runs/gpu-prm800k}
base=${BASE:-Qwen/Qwen2.5-Coder-1.5B-Instruct}
mkdir -p "$out"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

# Rated steps are the leaves of trees: with --packing prefixes an epoch reads a fourteenth of the tokens.
train=(prm train --model "$base" --head binary --neutral good --lora-rank 32 --packing prefixes
    --max-length 2048 --on-long drop --step-tokens 16384 --batch-tokens 4096 --device "${DEVICE:-cuda}")
split=(python -m benchmarks public-split --data "$data/prm800k_phase1/train_plus.jsonl.gz"
    --key instruction --exclude "$data/processbench" --train-share 1)

run "${split[@]}" --out "$out/prm800k"
run "${split[@]}" --train-problems 100 --out "$out/prm800k-control"
run "${train[@]}" --epochs "${EPOCHS:-2}" --data "prm800k:$out/prm800k/train.jsonl" --out "$out/prm"
run "${train[@]}" --epochs 1 --shuffle-labels --data "prm800k:$out/prm800k-control/train.jsonl" \
    --out "$out/prm-shuffled"
evaluate=(prm evaluate --prm "$out/prm" --shuffled-prm "$out/prm-shuffled" --device "${DEVICE:-cuda}")
run "${evaluate[@]}" --benchmark processbench --data "$data/processbench" --out "$out/processbench"
run "${evaluate[@]}" --benchmark prmbench --data "$data/prmbench/prmbench_classified.jsonl.gz" \
    --out "$out/prmbench"
run "${evaluate[@]}" --benchmark agentprocessbench \
    --data "$data/agentprocessbench/hotpotqa.jsonl" --out "$out/agentprocessbench"
