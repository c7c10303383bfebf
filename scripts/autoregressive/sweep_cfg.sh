#!/usr/bin/env bash
# Finds the best guidance: samples and scores every combination of some lists with few samples, then the one of lowest FID
# with many; leaves one table, one plot, sweep.json and report.html. Example:
#   CFG_SCALES="1.75 2.25 3 4" CFG_SCHEDULES="constant linear" REFERENCE=evaluations/VIRTUAL_imagenet256_labeled.npz \
#   OUT=sweep bash scripts/autoregressive/sweep_cfg.sh --gpt-ckpt results/000-GPT-B/checkpoints --image-size 384
#
# CFG_SCALES                           values of --cfg-scale
# CFG_SCHEDULES, TOP_PS                of --cfg-schedule and --top-p; without them those of the model or preset
# CFG_SCALES_WITHIN                    of --cfg-scale-within; "same" is plain guidance
# CFG_START, CFG_POWER                 one value, for the schedules that have it
# NUM_SAMPLES, NUM_FINAL_SAMPLES       10000 to search with, 50000 for the best; 0 leaves that out
# OUT, REFERENCE, EVALUATE             folder of the results; npz of the reference; more flags of the evaluator
# NPROC_PER_NODE                       processes that sample
#
# Flags go to sample_c2i_ddp.py. A second call samples and scores what is missing; one with other lists or another seed adds to
# the table, and chooses the best of its own seed. Another model needs another OUT.
set -euo pipefail
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd)      # paths are the caller's
out=${OUT:-sweep}
reference=${REFERENCE:-}
num_samples=${NUM_SAMPLES:-10000}
num_final=${NUM_FINAL_SAMPLES:-50000}
stop() {
    echo "sweep_cfg.sh: error: $1" >&2
    exit 2
}

# What can be wrong, before the first sample.
[ -f "$reference" ] || stop "expected REFERENCE=<npz of the reference>, found no file '$reference'"
[[ "$num_samples" =~ ^[1-9][0-9]*$ ]] || stop "expected NUM_SAMPLES above 0, got '$num_samples'"
[[ "$num_final" =~ ^[0-9]+$ ]] || stop "expected NUM_FINAL_SAMPLES of 0 or more, got '$num_final'"
if [ "$num_final" != 0 ] && [[ "${EVALUATE:-}" == *--metrics* && "${EVALUATE:-}" != *fid* ]]; then
    stop "expected fid among the --metrics of EVALUATE, by which the best is chosen; or NUM_FINAL_SAMPLES=0"
fi
withins=${CFG_SCALES_WITHIN:-same}
for name in CFG_SCALES TOP_PS CFG_SCALES_WITHIN CFG_START CFG_POWER; do
    for number in ${!name:-}; do
        [ "$name $number" != "CFG_SCALES_WITHIN same" ] || continue
        [[ "$number" =~ ^-?[0-9]*\.?[0-9]+$ ]] || stop "expected numbers in $name, got '$number'"
    done
done
for schedule in ${CFG_SCHEDULES:-}; do
    [[ "$schedule" =~ ^(constant|linear|power-cosine)$ ]] ||
        stop "expected constant, linear or power-cosine in CFG_SCHEDULES, got '$schedule'"
done
seed=0 is_seed=
for word in "$@"; do
    [ -z "$is_seed" ] || seed=$word
    is_seed=
    case "${word%%=*}" in
        --cfg-scale | --cfg-schedule | --cfg-scale-within | --cfg-start | --cfg-power | --top-p | --num-fid-samples | --sample-dir)
            stop "expected no ${word%%=*}, but a variable for it: see the first lines of the script" ;;
        --global-seed) if [ "$word" = --global-seed ]; then is_seed=yes; else seed=${word#*=}; fi ;;
    esac
done
flags=("$@")
report=(python "$root/scripts/sweep_report.py" "$out" --reference "$reference")

# Samples and scores one setting: its number of samples, then its flags.
score() {
    local count=$1 folder
    shift
    folder="${*#--}"
    folder="$out/$count-samples/${folder// /-}"
    echo "== $count samples, $*"
    torchrun --standalone --nproc_per_node="${NPROC_PER_NODE:-1}" "$root/autoregressive/sample/sample_c2i_ddp.py" \
        ${flags[@]+"${flags[@]}"} "$@" --num-fid-samples "$count" --sample-dir "$folder"
    for samples in "$folder"/*.npz; do                  # of other seeds, too, if they were sampled before
        # shellcheck disable=SC2086
        python3 "$root/evaluations/c2i/evaluator.py" "$reference" "$samples" --reuse ${EVALUATE:-}
    done
    "${report[@]}" >/dev/null                           # the table so far; stops if this does not belong to it
}

for scale in ${CFG_SCALES:-1 1.25 1.5 1.75 2 2.25 2.5}; do
    for schedule in ${CFG_SCHEDULES:-recorded}; do
        for top_p in ${TOP_PS:-recorded}; do
            for within in $withins; do
                setting=(--cfg-scale "$(printf %g "$scale")")
                [ "$schedule" = recorded ] || setting+=(--cfg-schedule "$schedule")
                [ "$top_p" = recorded ] || setting+=(--top-p "$(printf %g "$top_p")")
                [ "$within" = same ] || setting+=(--cfg-scale-within "$(printf %g "$within")")
                [ -z "${CFG_START:-}" ] || [ "$schedule" = constant ] || setting+=(--cfg-start "$CFG_START")
                [ -z "${CFG_POWER:-}" ] || [ "$schedule" != power-cosine ] || setting+=(--cfg-power "$CFG_POWER")
                score "$num_samples" "${setting[@]}"
            done
        done
    done
done
if [ "$num_final" != 0 ]; then
    best=$("${report[@]}" --best-of "$num_samples" --seed "$seed")
    # shellcheck disable=SC2086
    score "$num_final" $best
fi
"${report[@]}"
exec python "$root/scripts/report.py" "$out"
