#!/usr/bin/env bash
# Step 1: VQ checkpoint -> reordered VQ checkpoint and mapping. Without flags: of pretrained_models/vq_ds16_c2i.pt.
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd) || exit 1      # paths are the caller's
exec python "$root/balance_k_means.py" "$@"
