#!/usr/bin/env bash
# Samples and scores over a list of guidance values; ends with one table and one plot. Example:
#   CFG_SCALES="1.5 1.75 2.0 2.25" REFERENCE=evaluations/VIRTUAL_imagenet256_labeled.npz OUT=sweep \
#   bash scripts/autoregressive/sweep_cfg.sh --gpt-model GPT-B --gpt-ckpt results/000-GPT-B/checkpoints --image-size 384
# Flags go to sample_c2i_ddp.py; EVALUATE holds more flags of the evaluator, NPROC_PER_NODE the number of processes.
set -euo pipefail
cd "$(dirname "$0")/../.."
reference=${REFERENCE:?"expected REFERENCE=<npz of the reference>, got none"}
out=${OUT:-sweep}
for scale in ${CFG_SCALES:-1.0 1.25 1.5 1.75 2.0 2.25 2.5}; do
    echo "== guidance $scale"
    torchrun --standalone --nproc_per_node="${NPROC_PER_NODE:-1}" autoregressive/sample/sample_c2i_ddp.py "$@" \
        --cfg-scale "$scale" --sample-dir "$out/cfg-$scale"
    samples=$(find "$out/cfg-$scale" -maxdepth 1 -name '*.npz')
    # shellcheck disable=SC2086
    [ -e "${samples%.npz}.json" ] || python3 evaluations/c2i/evaluator.py "$reference" "$samples" ${EVALUATE:-}
done
exec python scripts/sweep_report.py "$out"
