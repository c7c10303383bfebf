#!/usr/bin/env bash
# Step 0: images -> codes. Example: bash scripts/autoregressive/extract_codes_c2i.sh --data-path /data/imagenet/train \
#   --code-path /data/codes --vq-ckpt pretrained_models/vq_ds16_c2i.pt --ten-crop --crop-range 1.1 --image-size 384
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec torchrun --nnodes="${NNODES:-1}" --nproc_per_node="${NPROC_PER_NODE:-8}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-12345}" \
    "$root/autoregressive/train/extract_codes_c2i.py" "$@"
