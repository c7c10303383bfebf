#!/usr/bin/env bash
# The whole method on 1,797 real handwritten digits, on a laptop, in under ten minutes and without a download:
# tokenizer -> codes -> reordered codebook -> GPT (lambda 1, and lambda 0 as the baseline) -> samples -> scores.
# A second call continues where the first one stopped; remove results/quickstart to start anew.
set -euo pipefail
[ $# -eq 0 ] || { echo "quickstart.sh: error: expected no arguments, got $#" >&2; exit 2; }
CDPATH="" cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt

out=results/quickstart
two="torchrun --standalone --nproc_per_node=2"
export OMP_NUM_THREADS=1        # the layers are small: a second core is better used by a second step than by a second thread
mkdir -p $out
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT         # what runs beside a step that failed

# step RESULT COMMAND...: runs a command that knows no resuming, unless its result is there.
step() {
    local result=$1
    shift
    if [ -e "$result" ]; then
        echo "$result is there"
    else
        "$@"
    fi
}

# beside LOG COMMAND...: runs a step in the background and keeps what it prints; `joined` waits for it.
beside() {
    log=$1
    shift
    "$@" >"$log" 2>&1 &
}

joined() {
    wait $! || { cat "$log"; return 1; }
}

train_gpt() {       # train_gpt LAMBDA
    python autoregressive/train/train_c2i.py --code-path $out/codes --results-dir "$out/gpt-lambda$1" \
        --gpt-model GPT-tiny --lambda-cce "$1" --mixed-precision none --max-steps 1500 --global-batch-size 64 --lr 3e-3 \
        --warmup 100 --lr-schedule linear --num-workers 0
}

sample() {          # sample LAMBDA
    $two autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt $out/gpt-lambda$1/000-* --sample-dir $out/samples-lambda$1 \
        --precision none --num-fid-samples 1500 --per-proc-batch-size 125 --cfg-scale 2 --top-p 0.9
}

evaluate() {        # evaluate LAMBDA
    python evaluations/c2i/evaluator.py $out/reference.npz $out/samples-lambda$1/*.npz --classifier $out/classifier.pt
}

echo "== 1/7 train a tokenizer (shown) and a small classifier to score with (beside it)"
beside $out/classifier.log step $out/classifier.pt python evaluations/c2i/train_classifier.py --dataset digits \
    --data-path train --val-path val --image-size 16 --output $out/classifier.pt
step $out/vq.pt python tokenizer/tokenizer_image/vq_train.py --dataset digits --data-path train --val-path val \
    --no-flip --smallest-crop 1 --image-size 16 --vq-model VQ-4-small --codebook-size 512 --max-steps 350 \
    --global-batch-size 32 --lr 1.5e-3 --lr-schedule linear --warmup 30 --mixed-precision none --num-workers 0 \
    --perceptual-weight 0 --disc-weight 0 --results-dir $out/vq --output $out/vq.pt
joined
echo "== 2/7 extract codes, two processes"
$two autoregressive/train/extract_codes_c2i.py --dataset digits --data-path train --no-flip --image-size 16 \
    --vq-ckpt $out/vq.pt --code-path $out/codes
echo "== 3/7 reorder the codebook"
python balance_k_means.py --vq-ckpt $out/vq.pt --cluster-size 16 --output-dir $out
echo "== 4/7 train two GPTs, lambda 1 (shown) and lambda 0 (beside it)"
beside $out/train-lambda0.log train_gpt 0
train_gpt 1
joined
echo "== 5/7 sample from both, two processes"
sample 1
sample 0
echo "== 6/7 evaluate both against the real digits"
step $out/reference.npz python evaluations/c2i/make_reference.py --dataset digits --data-path train --image-size 16 \
    --output $out/reference.npz
evaluate 1
evaluate 0
echo "== 7/7 report"
python scripts/quickstart_report.py $out
python scripts/report.py $out
