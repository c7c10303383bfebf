#!/usr/bin/env bash
# One GPU, ten minutes: is it right, and how fast is it? Example: bash scripts/benchmarks/gpu.sh --minutes 10 \
#   --out results/gpu
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec python "$root/scripts/benchmarks/gpu.py" "$@"
