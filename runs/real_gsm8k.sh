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
test_tasks=${TEST_TASKS:-24} train_tasks=${TRAIN_TASKS:-40} rl_steps=${RL_STEPS:-20}
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
    run prm label --tasks "math:$data/train.jsonl" --num-tasks "$train_tasks" --samples 2 \
        --rollouts 4 "${acting[@]}" --out "$out/labels-train"
fi

if [[ $part == all || $part == best ]]; then
    run prm train --labels "$out/labels-train" --model "$smollm" --epochs 3 --device "$device" \
        --out "$out/prm-smollm2"
    run prm evaluate --prm "$out/prm-smollm2" --labels "$out/labels-test" --device "$device"
    run prm score --prm "$out/prm-smollm2" --trajectories "$out/labels-test/trajectories.jsonl" \
        --device "$device" --out "$out/smollm2.jsonl"
    scores=(--scores "$out/smollm2.jsonl")
    if [[ ${LORA:-1} == 1 ]]; then
        run prm train --labels "$out/labels-train" --model "$qwen" --lora-rank 16 --epochs 1 \
            --precision bfloat16 --batch-tokens 2048 --device "$device" --out "$out/prm-qwen"
        run prm evaluate --prm "$out/prm-qwen" --labels "$out/labels-test" --device "$device"
        run prm score --prm "$out/prm-qwen" --trajectories "$out/labels-test/trajectories.jsonl" \
            --device "$device" --out "$out/qwen.jsonl"
        scores+=("$out/qwen.jsonl")
    fi
    run python -m benchmarks best-of-n --trajectories "$out/labels-test/trajectories.jsonl" \
        "${scores[@]}" --out "$out/best-of-4.json"
fi

if [[ $part == all || $part == optimize ]]; then
    system="Solve the problem with the calculator, one step at a time. End with: The answer is N."
    playing=(--tasks "math:$data/train.jsonl" --tools calculator --system-prompt "$system"
        --max-turn-tokens 96 --max-context 768 --max-steps 6)
    run policy synthesize --tasks "math:$data/train.jsonl" --tool calculator --max-calls 2 \
        --system-prompt "$system" --num-tasks "${WARMUP_TASKS:-3000}" --out "$out/demonstrations"
    run policy warmup --data "$out/demonstrations" --model "$smollm" --chat-format chatml \
        --epochs 1 --device "$device" --out "$out/warmup"
    run prm label "${playing[@]}" --first-task 3000 --num-tasks 60 --samples 2 --rollouts 4 \
        --policy "$out/warmup" --device "$device" --out "$out/labels-warmup"
    run prm train --labels "$out/labels-warmup" --model "$out/warmup" --epochs 3 \
        --device "$device" --out "$out/prm-warmup"
    for arm in outcome prm; do
        flags=()
        [ "$arm" = prm ] && flags=(--prm "$out/prm-warmup")
        run policy optimize "${playing[@]}" --first-task 4000 --num-tasks 500 \
            --policy "$out/warmup" "${flags[@]}" --tasks-per-step 8 --group-size 4 \
            --steps "$rl_steps" --learning-rate 1e-5 --warmup-steps 2 --device "$device" \
            --out "$out/$arm-seed0"
    done
    run python -m benchmarks curves --run "$out" --out "$out/curves"
fi
