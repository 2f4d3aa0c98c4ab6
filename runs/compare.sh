#!/usr/bin/env bash
# Outcome-only beside the PRM, three seeds each, from the policy and PRM of a finished demo.
#   runs/compare.sh [DEMO_FOLDER] [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
demo=${1:-runs/demo}
out=${2:-runs/compare}
steps=${STEPS:-20}
limit=(--max-context 512)  # as in the demo
mkdir -p "$out"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

for seed in 0 1 2; do
    for arm in outcome prm; do
        folder="$out/$arm-seed$seed"
        flags=()
        [ "$arm" = prm ] && flags=(--prm "$demo/prm")
        run policy optimize --policy "$demo/warmup" "${flags[@]}" --tasks arithmetic \
            --steps "$steps" --seed "$seed" --batch-tokens 1024 "${limit[@]}" --out "$folder"
        run policy evaluate --policy "$folder/policy" --tasks arithmetic --num-tasks 500 \
            --samples 2 "${limit[@]}" --out "$folder-test"
    done
done
run python -m benchmarks curves --run "$out" --out docs/results/compare
