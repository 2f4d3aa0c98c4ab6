#!/usr/bin/env bash
# Reward models on public data, on a CPU: best-of-N from published scores, then reward models from
# InterCode-SQL runs (a small one from scratch; the first layers of SmolLM2-135M) with their controls.
# About an hour on two idle cores at the default sizes; every training resumes where it was stopped.
#   runs/prm_public.sh DATA [FOLDER]
# DATA holds bon_pools/ and intercode/. ROWS and ROWS_LARGE are runs to train on.
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

grep '"model": "gpt-4"' "$out/sql/test.jsonl" > "$out/gpt4.jsonl"
evaluate=(prm evaluate --benchmark intercode)
run "${evaluate[@]}" --prm "$out/prm-tiny" --shuffled-prm "$out/prm-shuffled" \
    --data "$out/sql/test.jsonl" --problems "${PROBLEMS:-60}" --out "$out/eval-tiny"
run "${evaluate[@]}" --prm "$out/prm-no-gpt4" --data "$out/gpt4.jsonl" --out "$out/eval-no-gpt4"
run "${evaluate[@]}" --prm "$out/prm-smol6" --data "$out/sql/test.jsonl" --problems 16 \
    --out "$out/eval-smol6"
