#!/usr/bin/env bash
# Compares ways to guide one model: constant, linear, power-cosine and split guidance. Each chooses its scales by the FID of
# 2,000 samples of seed 1000, and is scored there with 10,000 samples of the seeds 1, 2 and 3. Example:
#   OUT=results/guidance/mine REFERENCE=reference.npz EVALUATE="--classifier classifier.pt" \
#   bash scripts/experiments/guidance.sh --gpt-ckpt results/000-GPT-B --vq-ckpt vq-reordered.pt
# Flags go to sample_c2i_ddp.py. A second call makes what is missing.
set -euo pipefail
root=$(CDPATH="" cd "$(dirname "$0")/../.." && pwd)      # paths are the caller's
out=${OUT:-}
reference=${REFERENCE:-}
if [ -z "$out" ] || [ ! -f "$reference" ]; then
    echo "guidance.sh: error: expected OUT=<folder> and REFERENCE=<npz of the reference>, got '$out' and '$reference'" >&2
    exit 2
fi
flags=("$@")
unset CFG_START CFG_POWER TOP_PS CFG_SCALES_WITHIN

# Searches for the scales of one way; the lists stand in the environment.
search() {
    OUT="$out/$1" REFERENCE="$reference" NUM_SAMPLES=2000 NUM_FINAL_SAMPLES=0 \
        bash "$root/scripts/autoregressive/sweep_cfg.sh" ${flags[@]+"${flags[@]}"} --global-seed 1000
}
CFG_SCHEDULES=constant CFG_SCALES="1 1.25 1.5 1.75 2" search constant
CFG_SCHEDULES=linear CFG_SCALES="1.5 2 2.5 3 4" search linear
CFG_SCHEDULES=power-cosine CFG_SCALES="1.5 2 3 4" search power-cosine
CFG_SCHEDULES=power-cosine CFG_SCALES="2 3 4 6" CFG_POWER=2 search power-cosine
CFG_SCHEDULES=constant CFG_SCALES="1 1.25 1.5 2" CFG_SCALES_WITHIN="1 1.25 1.5 2" search split

for way in constant linear power-cosine split; do
    best=$(python "$root/scripts/sweep_report.py" "$out/$way" --reference "$reference" --best-of 2000 --seed 1000)
    for seed in 1 2 3; do
        echo "== $way, seed $seed: $best"
        folder="$out/$way/10000-samples/seed-$seed"
        # shellcheck disable=SC2086
        python "$root/autoregressive/sample/sample_c2i_ddp.py" ${flags[@]+"${flags[@]}"} $best \
            --global-seed "$seed" --num-fid-samples 10000 --sample-dir "$folder"
        for samples in "$folder"/*.npz; do
            # shellcheck disable=SC2086
            python "$root/evaluations/c2i/evaluator.py" "$reference" "$samples" --reuse ${EVALUATE:-}
        done
    done
done
exec python "$root/scripts/experiments/guidance_report.py" "$out"
