#!/usr/bin/env bash
# Step 1: VQ checkpoint -> reordered VQ checkpoint and mapping. Without flags: of pretrained_models/vq_ds16_c2i.pt.
cd "$(dirname "$0")/../.." || exit 1
exec python balance_k_means.py "$@"
