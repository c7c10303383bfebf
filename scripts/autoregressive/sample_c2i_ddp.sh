#!/usr/bin/env bash
# Step 3: checkpoint -> npz. Example: bash scripts/autoregressive/sample_c2i_ddp.sh --gpt-model GPT-B \
#   --gpt-ckpt results/000-GPT-B-lambda=1-cluster_size=128/checkpoints --image-size 384 --cfg-scale 2.25
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec torchrun --nnodes="${NNODES:-1}" --nproc_per_node="${NPROC_PER_NODE:-8}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-12345}" \
    "$root/autoregressive/sample/sample_c2i_ddp.py" "$@"
