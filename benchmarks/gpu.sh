#!/usr/bin/env bash
# All that waits for a GPU, in at most 8 minutes, what is wanted most first: bash benchmarks/gpu.sh [FOLDER]
# One text file a part, with its exit status at the end (124: its time was up).
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-outputs/gpu}
mkdir -p "$folder"

part() {
  local seconds=$1 name=$2
  shift 2
  timeout --signal=INT --kill-after=5 "$seconds" "$@" > "$folder/$name.txt" 2>&1
  echo "$* : exit status $? after $SECONDS s in all" | tee -a "$folder/$name.txt"
}

export VLLM_USE_FLASHINFER_SAMPLER=0  # its kernels would be compiled first
part 80 sharded python -m capo_exp distributed=fsdp2 distributed.processes=1 rollout=vllm num_steps=3 logger=files overwrite=true output_dir="$folder/runs"
part 130 step python benchmarks/gpu_step.py --device cuda --steps 5 --model smollm2_135m rollout.engine.enforce_eager=true
part 65 rollout python benchmarks/rollout.py --device cuda --rounds 2 --batches 96 --lengths 64 rollout.engine.enforce_eager=true
part 60 growth python -m benchmarks.growth --repeats 3 --device cuda
part 80 curvature python benchmarks/gpu_curvature.py
