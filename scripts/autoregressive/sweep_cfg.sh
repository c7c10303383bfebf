#!/usr/bin/env bash
# Finds the best guidance: samples and scores every combination of some lists with few samples, then the one of lowest FID
# with many; ends with one table, one plot and sweep.json. Example:
#   CFG_SCALES="2.0 3.0 4.0 5.0" CFG_SCHEDULES="constant linear" REFERENCE=evaluations/VIRTUAL_imagenet256_labeled.npz \
#   OUT=sweep bash scripts/autoregressive/sweep_cfg.sh --gpt-ckpt results/000-GPT-B/checkpoints --image-size 384
#
# CFG_SCALES, CFG_SCHEDULES, TOP_PS    values of --cfg-scale, --cfg-schedule, --top-p
# CFG_SCALES_WITHIN                    of --cfg-scale-within; "same" is plain guidance
# NUM_SAMPLES, NUM_FINAL_SAMPLES       10000 to search with, 50000 for the best; 0 leaves that out
# EVALUATE, NPROC_PER_NODE             more flags of the evaluator; processes that sample
#
# Flags go to sample_c2i_ddp.py. A second call samples and scores what is missing; one with other lists or flags adds to the
# table. A score of another reference, network or seed is made again.
set -euo pipefail
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd)      # paths are the caller's
out=${OUT:-sweep}
reference=${REFERENCE:-}
stop() {
    echo "sweep_cfg.sh: error: $1" >&2
    exit 2
}
[ -f "$reference" ] || stop "expected REFERENCE=<npz of the reference>, found no file '$reference'"
for word in "$@"; do
    case "${word%%=*}" in
        --cfg-scale | --cfg-schedule | --cfg-scale-within | --top-p | --num-fid-samples | --sample-dir)
            stop "expected the values of ${word%%=*} in the environment, see the first lines of the script, got the flag" ;;
    esac
done
flags=("$@")

# Samples and scores one setting: its number of samples, then its flags.
score() {
    local num_samples=$1 folder
    shift
    folder="${*#--}"
    folder="$out/$num_samples-samples/${folder// /-}"
    echo "== $num_samples samples, $*"
    torchrun --standalone --nproc_per_node="${NPROC_PER_NODE:-1}" "$root/autoregressive/sample/sample_c2i_ddp.py" \
        ${flags[@]+"${flags[@]}"} "$@" --num-fid-samples "$num_samples" --sample-dir "$folder"
    for samples in "$folder"/*.npz; do                  # of other seeds, too, if they were sampled before
        # shellcheck disable=SC2086
        python3 "$root/evaluations/c2i/evaluator.py" "$reference" "$samples" --reuse ${EVALUATE:-}
    done
}

num_samples=${NUM_SAMPLES:-10000}
for scale in ${CFG_SCALES:-1.0 1.25 1.5 1.75 2.0 2.25 2.5}; do
    for schedule in ${CFG_SCHEDULES:-constant}; do
        for within in ${CFG_SCALES_WITHIN:-same}; do
            for top_p in ${TOP_PS:-1.0}; do
                setting=(--cfg-scale "$scale" --cfg-schedule "$schedule" --top-p "$top_p")
                [ "$within" = same ] || setting+=(--cfg-scale-within "$within")
                score "$num_samples" "${setting[@]}"
            done
        done
    done
done
report=(python "$root/scripts/sweep_report.py" "$out" --reference "$reference")
if [ "${NUM_FINAL_SAMPLES:-50000}" != 0 ]; then
    best=$("${report[@]}" --best-of "$num_samples")
    # shellcheck disable=SC2086
    score "${NUM_FINAL_SAMPLES:-50000}" $best
fi
exec "${report[@]}"
