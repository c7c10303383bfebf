#!/usr/bin/env bash
# Samples and scores over a list of guidance values; ends with one table and one plot. Example:
#   CFG_SCALES="1.5 1.75 2.0 2.25" REFERENCE=evaluations/VIRTUAL_imagenet256_labeled.npz OUT=sweep \
#   bash scripts/autoregressive/sweep_cfg.sh --gpt-model GPT-B --gpt-ckpt results/000-GPT-B/checkpoints --image-size 384
# Flags go to sample_c2i_ddp.py; EVALUATE holds more flags of the evaluator, NPROC_PER_NODE the number of processes.
# A second call samples and scores what is missing; a score of another reference, network or seed is made again.
set -euo pipefail
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd)      # paths are the caller's
reference=${REFERENCE:-}
[ -f "$reference" ] || {
    echo "sweep_cfg.sh: error: expected REFERENCE=<npz of the reference>, found no file '$reference'" >&2
    exit 2
}
out=${OUT:-sweep}
for scale in ${CFG_SCALES:-1.0 1.25 1.5 1.75 2.0 2.25 2.5}; do
    echo "== guidance $scale"
    torchrun --standalone --nproc_per_node="${NPROC_PER_NODE:-1}" "$root/autoregressive/sample/sample_c2i_ddp.py" "$@" \
        --cfg-scale "$scale" --sample-dir "$out/cfg-$scale"
    for samples in "$out/cfg-$scale"/*.npz; do          # of other seeds, too, if they were sampled before
        # shellcheck disable=SC2086
        python3 "$root/evaluations/c2i/evaluator.py" "$reference" "$samples" --reuse ${EVALUATE:-}
    done
done
exec python "$root/scripts/sweep_report.py" "$out" --reference "$reference"
