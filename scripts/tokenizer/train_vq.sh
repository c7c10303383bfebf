#!/usr/bin/env bash
# Trains a tokenizer. Example: bash scripts/tokenizer/train_vq.sh --data-path /data/imagenet/train \
#   --val-path /data/imagenet/val --vq-model VQ-16 --image-size 256 --results-dir results
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec torchrun --nnodes="${NNODES:-1}" --nproc_per_node="${NPROC_PER_NODE:-8}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-12345}" \
    "$root/tokenizer/tokenizer_image/vq_train.py" "$@"
