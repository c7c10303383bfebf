#!/usr/bin/env bash
# Step 4: two npz -> IS, FID, sFID, precision, recall. Example: bash scripts/autoregressive/evaluate_c2i.sh \
#   evaluations/VIRTUAL_imagenet256_labeled.npz samples/your_generated_samples.npz
cd "$(dirname "$0")/../.." || exit 1
exec python3 evaluations/c2i/evaluator.py "$@"
