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
  timeout --signal=INT --kill-after=10 "$seconds" "$@" > "$folder/$name.txt" 2>&1
  echo "$* : exit status $? after $SECONDS s in all" | tee -a "$folder/$name.txt"
}

export VLLM_USE_FLASHINFER_SAMPLER=0  # its kernels would be compiled first
part 150 curvature python benchmarks/gpu_curvature.py
part 90 sharded python -m capo_exp distributed=fsdp2 distributed.processes=1 rollout=vllm num_steps=3 logger=files overwrite=true output_dir="$folder/runs"
part 110 step python benchmarks/gpu_step.py --device cuda --steps 6
part 80 growth python -m benchmarks.growth --repeats 3 --device cuda
part 50 rollout python benchmarks/rollout.py --device cuda --rounds 2 --batches 96 --lengths 64
