#!/usr/bin/env bash
# Step 2: codes -> checkpoints. Example: bash scripts/autoregressive/train_c2i.sh --code-path /data/codes \
#   --results-dir results --image-size 384 --gpt-model GPT-B
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec torchrun --nnodes="${NNODES:-1}" --nproc_per_node="${NPROC_PER_NODE:-8}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-12345}" \
    "$root/autoregressive/train/train_c2i.py" "$@"
