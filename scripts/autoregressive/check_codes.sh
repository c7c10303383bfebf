#!/usr/bin/env bash
# A look at the codes before training. Example: bash scripts/autoregressive/check_codes.sh --code-path /data/codes \
#   --data-path /data/imagenet/train --vq-ckpt pretrained_models/vq_ds16_c2i.pt
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec python "$root/autoregressive/train/check_codes.py" "$@"
