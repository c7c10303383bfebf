#!/usr/bin/env bash
# Judges a tokenizer. Example: bash scripts/tokenizer/val.sh --data-path /data/imagenet/val \
#   --vq-ckpt pretrained_models/vq_ds16_c2i.pt --output results/vq16-val.npz
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec python "$root/tokenizer/validation/val.py" "$@"
