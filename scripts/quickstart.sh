#!/usr/bin/env bash
# The whole method on 1,797 real handwritten digits, on a laptop, in under ten minutes and without a download:
# tokenizer -> codes -> reordered codebook -> GPT (lambda 1, and lambda 0 as the baseline) -> samples -> scores.
# A second call continues where the first one stopped; remove results/quickstart to start anew.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt

out=results/quickstart
vq="--vq-model VQ-4-small --codebook-size 512"
gpt="--gpt-model GPT-tiny --num-classes 10 --image-size 16 --downsample-size 4 --cluster-size 16"
reordered="$out/vq-reorder-kmeans+nearest-cluster_size=16.pt"
mapping="$out/mapping-kmeans+nearest-cluster_size=16.pt"
two="torchrun --standalone --nproc_per_node=2"
export OMP_NUM_THREADS=1        # small layers: two processes of one thread beat one process of two, by far on a busy machine
mkdir -p $out

# step RESULT TITLE COMMAND...: runs a command that knows no resuming, unless its result is there.
step() {
    local result=$1 title=$2
    shift 2
    if compgen -G "$result" >/dev/null; then
        echo "== $title: done before ($result)"
    else
        echo "== $title"
        "$@"
    fi
}

train_gpt() {       # train_gpt LAMBDA
    python autoregressive/train/train_c2i.py $gpt $vq --vocab-size 512 --lambda-cce "$1" \
        --code-path $out/codes --mapping-path "$mapping" --vq-ckpt "$reordered" --results-dir $out/gpt-lambda$1 \
        --mixed-precision none --max-updates 2000 --global-batch-size 64 --lr 2e-3 --warmup 100 --lr-schedule linear
}

train_both() {
    train_gpt 0 >$out/train-lambda0.log 2>&1 &
    train_gpt 1
    wait $! || { cat $out/train-lambda0.log; return 1; }
}

sample() {          # sample LAMBDA
    $two autoregressive/sample/sample_c2i_ddp.py $gpt $vq --vq-ckpt "$reordered" --gpt-ckpt $out/gpt-lambda$1/000-* \
        --image-size-eval 16 --precision none --num-fid-samples 1500 --per-proc-batch-size 125 --cfg-scale 2 \
        --sample-dir $out/samples-lambda$1
}

evaluate() {        # evaluate LAMBDA
    python evaluations/c2i/evaluator.py $out/reference.npz $out/samples-lambda$1/*.npz --classifier $out/classifier.pt
}

step $out/vq.pt "1/8 tokenizer, two processes" $two tokenizer/tokenizer_image/vq_train.py --dataset digits --data-path train \
    --val-path heldout --no-flip --smallest-crop 1 --image-size 16 $vq --max-updates 400 --global-batch-size 32 \
    --lr 1.5e-3 --lr-schedule linear --warmup 30 --mixed-precision none --num-workers 0 --results-dir $out/vq \
    --output $out/vq.pt
echo "== 2/8 extract codes, two processes"
$two autoregressive/train/extract_codes_c2i.py --dataset digits --data-path train --no-flip --image-size 16 $vq \
    --vq-ckpt $out/vq.pt --code-path $out/codes
step "$reordered" "3/8 reorder the codebook" python balance_k_means.py --vq-ckpt $out/vq.pt --cluster-size 16 \
    --output-dir $out
echo "== 4/8 train two GPTs, lambda 1 (shown) and lambda 0 (beside it)"
train_both
step $out/classifier.pt "5/8 train a small classifier to score with" python evaluations/c2i/train_classifier.py \
    --dataset digits --data-path train --val-path heldout --image-size 16 --output $out/classifier.pt
echo "== 6/8 sample from both, two processes"
sample 1
sample 0
step $out/reference.npz "7/8 reference of real digits" python evaluations/c2i/make_reference.py --dataset digits \
    --data-path train --image-size 16 --output $out/reference.npz
step "$out/samples-lambda1/*.json" "7/8 evaluate, lambda 1" evaluate 1
step "$out/samples-lambda0/*.json" "7/8 evaluate, lambda 0" evaluate 0
echo "== 8/8 report"
python scripts/quickstart_report.py $out
