#!/usr/bin/env bash
# Reward models on public data, on a CPU: best-of-N from published scores, then reward models from
# InterCode-SQL runs (a small one from scratch; SmolLM2-135M, its first layers and whole) and from PRM800K
# (measured on ProcessBench) with their controls. Some three hours of two idle cores at the default
# sizes; every training resumes where it was stopped.
#   runs/prm_public.sh DATA [FOLDER]
# DATA holds bon_pools/, intercode/, prm800k_phase1/ and processbench/. ROWS, ROWS_LARGE and ROWS_WHOLE
# are runs to train on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 out=${2:-runs/public}
rows=${ROWS:-1500} rows_large=${ROWS_LARGE:-240} smollm=${SMOLLM:-HuggingFaceTB/SmolLM2-135M-Instruct}
mkdir -p "$out"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run python -m benchmarks bon-pools --pools "$data/bon_pools" --out "$out/bon.json"

sql=$data/intercode/sql_runs.jsonl.gz
split=(python -m benchmarks public-split --data "$sql" --key task_id)
run "${split[@]}" --train-rows "$rows" --out "$out/sql"
run "${split[@]}" --train-rows "$rows_large" --out "$out/sql-large"
run "${split[@]}" --train-rows "${ROWS_WHOLE:-560}" --out "$out/sql-whole"
run "${split[@]}" --train-rows 400 --out "$out/sql-control"
run "${split[@]}" --train-rows "${ROWS_LEFT_OUT:-500}" --without model=gpt-4 --out "$out/sql-no-gpt4"
[[ -d $out/tiny ]] || run python -m benchmarks small-base --data "intercode:$out/sql/train.jsonl" \
    --out "$out/tiny"
[[ -d $out/smol6 ]] || run python -m benchmarks small-base --first-layers-of "$smollm" --layers 6 \
    --out "$out/smol6"

train=(prm train --on-long drop --patience 0)
tiny=(--model "$out/tiny" --max-length 768 --learning-rate 1e-3 --step-tokens 4096)
run "${train[@]}" "${tiny[@]}" --data "intercode:$out/sql/train.jsonl" --epochs 2 --out "$out/prm-tiny"
run "${train[@]}" "${tiny[@]}" --data "intercode:$out/sql-control/train.jsonl" --epochs 1 \
    --shuffle-labels --out "$out/prm-shuffled"
run "${train[@]}" "${tiny[@]}" --data "intercode:$out/sql-no-gpt4/train.jsonl" --epochs 2 \
    --out "$out/prm-no-gpt4"
run "${train[@]}" --model "$out/smol6" --max-length 512 --learning-rate 1e-4 --epochs 1 \
    --step-tokens 2048 \
    --data "intercode:$out/sql-large/train.jsonl" --out "$out/prm-smol6"
# --precision bfloat16 pays on a CPU that multiplies in bfloat16; elsewhere leave it out.
whole=(--model "$smollm" --learning-rate 1e-4 --epochs 1 --batch-tokens 1024 --packing prefixes
    --precision bfloat16)
run "${train[@]}" "${whole[@]}" --max-length 768 --step-tokens 2048 \
    --data "intercode:$out/sql-whole/train.jsonl" --out "$out/prm-smol"

prm800k=(python -m benchmarks public-split --data "$data/prm800k_phase1/train_plus.jsonl.gz"
    --key instruction --exclude "$data/processbench" --train-share 1)
rated=(--head binary --neutral good --max-length 512 --step-tokens 4096)
run "${prm800k[@]}" --train-problems 360 --out "$out/prm800k"
run "${prm800k[@]}" --train-problems 40 --out "$out/prm800k-control"
run "${train[@]}" "${whole[@]}" "${rated[@]}" --data "prm800k:$out/prm800k/train.jsonl" \
    --out "$out/prm-800k"
run "${train[@]}" "${whole[@]}" "${rated[@]}" --data "prm800k:$out/prm800k-control/train.jsonl" \
    --shuffle-labels --out "$out/prm-800k-shuffled"

grep '"model": "gpt-4"' "$out/sql/test.jsonl" > "$out/gpt4.jsonl"
evaluate=(prm evaluate --benchmark intercode)
run "${evaluate[@]}" --prm "$out/prm-tiny" --shuffled-prm "$out/prm-shuffled" \
    --data "$out/sql/test.jsonl" --problems "${PROBLEMS:-60}" --out "$out/eval-tiny"
run "${evaluate[@]}" --prm "$out/prm-no-gpt4" --data "$out/gpt4.jsonl" --out "$out/eval-no-gpt4"
run "${evaluate[@]}" --prm "$out/prm-smol6" --data "$out/sql/test.jsonl" --problems 16 \
    --out "$out/eval-smol6"
run "${evaluate[@]}" --prm "$out/prm-smol" --data "$out/sql/test.jsonl" --problems 40 \
    --out "$out/eval-smol"
run prm evaluate --benchmark processbench --prm "$out/prm-800k" \
    --shuffled-prm "$out/prm-800k-shuffled" --data "$data/processbench" --problems 320 \
    --out "$out/eval-processbench"
