#!/usr/bin/env bash
# Step 4: two npz -> IS, FID, sFID, precision, recall. Example: bash scripts/autoregressive/evaluate_c2i.sh \
#   evaluations/VIRTUAL_imagenet256_labeled.npz samples/your_generated_samples.npz
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec python3 "$root/evaluations/c2i/evaluator.py" "$@"
