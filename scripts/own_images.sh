#!/usr/bin/env bash
# Tokenizer and GPT for images of your own: a folder of class folders in; samples, scores and a page to look at out. Example:
#   bash scripts/own_images.sh /data/my_images results/mine
# Sizes are chosen from the data and printed; TOKENIZER_STEPS and GPT_STEPS are lengths of the trainings. A folder with train
# and val inside is taken as it is divided. Run the same command again to continue where it was stopped; with larger
# GPT_STEPS the GPT is trained for longer.
set -euo pipefail
[ $# -eq 2 ] || { echo "own_images.sh: error: expected IMAGES OUT, got $# arguments; put train and val into one folder" >&2; exit 2; }
# absolute PATH: what the caller means by PATH, from any folder.
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
images=$(absolute "$1") out=$(absolute "$2")
CDPATH="" cd "$(dirname "$0")/.."
. scripts/environment.sh requirements.txt

plan=$(python scripts/own_images_plan.py "$images" "$out" \
    --tokenizer-steps "${TOKENIZER_STEPS:-0}" --gpt-steps "${GPT_STEPS:-0}")
echo "== 1/7 looked at the images"
read -r size codes cluster tokenizer_steps classifier_steps gpt_steps samples <<<"$plan"
train="$out/images/train" val="$out/images/val"
few="--max-failures 0.05"       # of the images may be broken inside

echo "== 2/7 train a tokenizer, and a small classifier to score with"
python tokenizer/tokenizer_image/vq_train.py --data-path "$train" --val-path "$val" --image-size "$size" --smallest-crop 1 \
    --vq-model VQ-4-small --codebook-size "$codes" --perceptual-weight 0 --disc-weight 0 --mixed-precision none \
    --global-batch-size 32 --max-steps "$tokenizer_steps" --lr 2e-3 --lr-schedule linear --warmup 50 --revive-every 50 \
    --log-every 50 --val-every 500 --ckpt-steps 250 --keep-checkpoints 2 $few --results-dir "$out/vq" --output "$out/vq.pt"
[ -e "$out/classifier.pt" ] || python evaluations/c2i/train_classifier.py --data-path "$train" --val-path "$val" \
    --image-size "$size" --flip --max-steps "$classifier_steps" $few --output "$out/classifier.pt"
echo "== 3/7 extract codes"
python autoregressive/train/extract_codes_c2i.py --data-path "$train" --image-size "$size" --vq-ckpt "$out/vq.pt" $few \
    --code-path "$out/codes"
echo "== 4/7 reorder the codebook"
python balance_k_means.py --vq-ckpt "$out/vq.pt" --cluster-size "$cluster" --output-dir "$out"
echo "== 5/7 train a GPT"
python autoregressive/train/train_c2i.py --code-path "$out/codes" --results-dir "$out/gpt" --gpt-model GPT-tiny \
    --mixed-precision none --global-batch-size 64 --max-steps "$gpt_steps" --lr 2e-3 --warmup 100 --lr-schedule linear \
    --log-every 50 --val-every 200 --ckpt-steps 200 --keep-checkpoints 2
echo "== 6/7 sample, and evaluate against the training images"
gpt=$(ls -d "$out"/gpt/*/ | tail -n 1)
python autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt "$gpt" --precision none --cfg-scale 2 --num-fid-samples "$samples" \
    --sample-dir "$out/samples"
[ -e "$out/reference.npz" ] || python evaluations/c2i/make_reference.py --data-path "$train" --image-size "$size" $few \
    --output "$out/reference.npz"
newest=$(printf '%s\n' "$out"/samples/*.npz | tail -n 1)        # a longer training has samples of its own
python evaluations/c2i/evaluator.py "$out/reference.npz" "$newest" --classifier "$out/classifier.pt"
echo "== 7/7 a page to look at"
python autoregressive/sample/sample_c2i.py --gpt-ckpt "$gpt" --precision none --cfg-scale 2 --all-classes \
    --output "$out/samples.png"
python scripts/report.py "$out"
