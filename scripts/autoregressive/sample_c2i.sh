#!/usr/bin/env bash
# A few pictures of chosen classes. Example: bash scripts/autoregressive/sample_c2i.sh --preset IAR-B-384 \
#   --gpt-ckpt results/000-GPT-B-lambda=1-cluster_size=128/checkpoints --class-ids 207,360
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec python "$root/autoregressive/sample/sample_c2i.py" "$@"
