#!/usr/bin/env bash
# Tokenizer and GPT for images of your own: a folder of class folders in, a picture of samples out. Example:
#   bash scripts/own_images.sh /data/my_images/train /data/my_images/val results/mine
# For small pictures (32 pixels, 8 x 8 tokens, 1024 codes); run the same command again to continue where it was stopped.
set -euo pipefail
[ $# -eq 3 ] || { echo "own_images.sh: error: expected TRAIN VAL OUT, got $# arguments" >&2; exit 2; }
for folder in "$1" "$2"; do
    [ -d "$folder" ] || { echo "own_images.sh: error: $folder: expected a folder of class folders, found none" >&2; exit 2; }
done
# absolute PATH: what the caller means by PATH, from any folder.
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
train=$(absolute "$1") val=$(absolute "$2") out=$(absolute "$3")
CDPATH="" cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt
classes=$({ find -L "$train" -mindepth 1 -maxdepth 1 -type d -not -name '.*' 2>/dev/null || true; } | wc -l)
vq="--vq-model VQ-4-small --codebook-size 1024"
gpt="--gpt-model GPT-tiny --num-classes $classes --image-size 32 --downsample-size 4 --cluster-size 32"
reordered="$out/vq-reorder-kmeans+nearest-cluster_size=32.pt"
mapping="$out/mapping-kmeans+nearest-cluster_size=32.pt"

echo "== 1/5 train a tokenizer"
# shellcheck disable=SC2086
python tokenizer/tokenizer_image/vq_train.py --data-path "$train" --val-path "$val" --image-size 32 --smallest-crop 1 \
    $vq --perceptual-weight 0 --disc-weight 0 --mixed-precision none --global-batch-size 32 \
    --max-steps "${TOKENIZER_STEPS:-1350}" --lr 2e-3 --lr-schedule linear --warmup 50 --revive-every 50 \
    --log-every 50 --val-every 450 --ckpt-steps 450 --results-dir "$out/vq" --output "$out/vq.pt"
echo "== 2/5 extract codes"
# shellcheck disable=SC2086
python autoregressive/train/extract_codes_c2i.py --data-path "$train" --image-size 32 $vq --vq-ckpt "$out/vq.pt" \
    --code-path "$out/codes"
echo "== 3/5 reorder the codebook"
python balance_k_means.py --vq-ckpt "$out/vq.pt" --cluster-size 32 --output-dir "$out"
echo "== 4/5 train a GPT"
# shellcheck disable=SC2086
python autoregressive/train/train_c2i.py $gpt --vocab-size 1024 $vq --code-path "$out/codes" --mapping-path "$mapping" \
    --vq-ckpt "$reordered" --results-dir "$out/gpt" --mixed-precision none --global-batch-size 64 \
    --max-steps "${GPT_STEPS:-600}" --lr 2e-3 --warmup 100 --lr-schedule linear --log-every 50 --val-every 500
echo "== 5/5 sample four pictures of each class"
# shellcheck disable=SC2086
python autoregressive/sample/sample_c2i.py $gpt $vq --vq-ckpt "$reordered" --gpt-ckpt "$(ls -d "$out"/gpt/* | tail -n 1)" \
    --image-size-eval 32 --precision none --cfg-scale 2 --class-ids "$(seq -s, 0 $((classes - 1)))" \
    --output "$out/samples.png"
