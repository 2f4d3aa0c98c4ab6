#!/usr/bin/env bash
# The runs of real_gsm8k.sh with larger numbers on one GPU, transformers engine.
#   runs/gpu_gsm8k.sh GSM8K_FOLDER QWEN SMOLLM2 [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
export ENGINE=transformers DEVICE=cuda CONCURRENCY=256
export TEST_TASKS=200 RL_STEPS=60 GROUP_SIZE=32 RL_TEST_SAMPLES=8
exec runs/real_gsm8k.sh "$1" "$2" "$3" "${4:-runs/gpu}"
