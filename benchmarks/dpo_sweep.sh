#!/usr/bin/env bash
# Where DPO's learning rate and number of pairs come from: one round of DPO from the SFT model of a
# validation run, for every learning rate, share of pairs and training seed, graded on its
# validation problems. Never run it on a seed or a file that is reported.
#
#   EVAL=validation SEEDS=100 OUT=runs/validation bash run_ilr.sh
#   bash benchmarks/dpo_sweep.sh runs/validation/seed_100
set -euo pipefail
run=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
LRS=${LRS:-3e-6 1e-5 3e-5}
SHARES=${SHARES:-0.15}
TRAININGS=${TRAININGS:-0 1}       # training seeds
out=$run/dpo_sweep
export OMP_NUM_THREADS=1

mkdir -p "$out"
echo "| share of pairs | learning rate | training seed | validation accuracy |"
echo "| --- | --- | --- | --- |"
for share in $SHARES; do
  pairs=$out/pairs_$share.jsonl
  [ -e "$pairs" ] || "$PYTHON" refine.py --method pairs --task arithmetic --max-replace "$share" \
    --comparisons "$run/dpo_1/comparisons.jsonl" --out "$pairs" >&2
  for lr in $LRS; do
    for seed in $TRAININGS; do
      model=$out/${share}_${lr}_$seed
      [ -e "$model" ] || "$PYTHON" dpo.py --model "$run/sft/model_1" --data "$pairs" \
        --out "$model" --lr "$lr" --epochs 2 --batch-size 32 --micro-tokens 2048 \
        --seed "$seed" >&2
      [ -e "$model.jsonl" ] || "$PYTHON" generate.py --model "$model" \
        --data "$run/data/validation.jsonl" --out "$model.jsonl" --max-new-tokens 56 \
        --batch-size 128 >&2
      graded=$("$PYTHON" evaluate.py grade --task arithmetic --data "$model.jsonl")
      accuracy=$(echo "$graded" | sed 's/.*accuracy \([0-9.]*%\).*/\1/')
      echo "| $share | $lr | $seed | $accuracy |"
    done
  done
done
