#!/usr/bin/env bash
# Judges a tokenizer. Example: bash scripts/tokenizer/val.sh --data-path /data/imagenet/val \
#   --vq-ckpt pretrained_models/vq_ds16_c2i.pt --output results/vq16-val.npz
cd "$(dirname "$0")/../.." || exit 1
exec python tokenizer/validation/val.py "$@"
