#!/usr/bin/env bash
# Iterative label refinement and DPO under unreliable supervision, from data to report.
#
#   bash run_ilr.sh [TASK]        arithmetic (default: two CPU cores, minutes); with a GPU gsm8k,
#                                 gsm8k-70b, bird, saferpaca; or any file of tasks/
#   bash run_ilr.sh --help        the settings, which are variables: ROUNDS=6 bash run_ilr.sh
#   bash run_ilr.sh --dry-run     every stage's name and command, in order; nothing runs
#   bash run_ilr.sh --bases       only the base models: BASE_SEED=1 makes another pair of them
#   bash run_ilr.sh gsm8k --estimate     memory, disk and hours of each on an H100 (=A100, =4090)
#   FROM=runs/a OUT=runs/b bash run_ilr.sh     take over from runs/a what an edit leaves unchanged
#
# A run that is started again skips what is complete and continues what was cut off.
# `stage NAME COMMAND` puts a command on the plan. The last line of this file runs the plan:
# a stage starts when the files that it reads are there, JOBS model stages side by side.
set -euo pipefail
caller=$PWD here=$(CDPATH="" cd "$(dirname "$0")" && pwd)
. "$here/core/stages.sh"       # the settings of presets/, their checks, and `stage`
. "$here/core/steps.sh"        # details of the weak side, and the steps of baselines

# ---------------------------------------------------------------- steps that several parts share
finetune() {   # finetune NAME OUT SEED MODEL RECORDS LR FLAGS...: SFT of the strong side
  local name=$1 out=$2 order=$3 model=$4 records=$5 lr=$6
  shift 6
  stage "$name" sft.py --model "$model" --data "$records" --out "$out" --seed "$order" --lr "$lr" \
    --epochs "$SFT_EPOCHS" --batch-size "$SFT_BATCH" $TRAINING $ADAPTERS "$@"
}

dpo() {        # dpo NAME OUT SEED FLAGS...: DPO of $policy on the round's preferences
  local name=$1 out=$2 order=$3
  shift 3
  stage "$name" dpo.py --model "$policy" --data "$dir/preferences.jsonl" --task "$TASK" \
    --out "$out" --loss "$DPO_LOSS" ${BETA:+--beta "$BETA"} --nll-weight "$DPO_NLL" --lr "$DPO_LR" \
    --epochs "$DPO_EPOCHS" --batch-size "$DPO_BATCH" --seed "$order" $TRAINING $ADAPTERS \
    $dpo_flags "$@"
}

grade() {      # grade NAME FILE: FILE.jsonl -> FILE.graded.jsonl
  local strict=''                # what all methods begin with must be answers at all
  case $1 in weak/*) [ "$LABEL_NOISE" ] || strict=--refuse-unparsed ;;
             sft/*) strict=--refuse-unparsed ;; esac
  stage "$1" evaluate.py grade --task "$TASK" --data "$2.jsonl" --out "$2.graded.jsonl" $strict
}

grade_labels() { [ "$GRADE_LABELS" = 0 ] || grade "$1/grade_labels" "$2/labels"; }

answer() {     # answer NAME DIR MODEL K FLAGS...: a model's test answers, graded
  local name=$1 dir=$2 model=$3 k=$4
  shift 4
  stage "$name/answer_$k" generate.py --model "$model" --data "$questions" \
    --out "$dir/eval_$k.jsonl" $decoding "$@"
  grade "$name/grade_$k" "$dir/eval_$k"
}

retrain() {    # retrain NAME DIR LABELS: the strong base model on LABELS, and its test answers
  local k
  for ((k = 1; k <= RETRAINS; k++)); do
    finetune "$1/train_$k" "$2/model_$k" $((seed + 1000 * (k - 1))) "$strong" "$3" \
      "$SFT_LR" --task "$TASK"
    answer "$1" "$2" "$2/model_$k" $k $LOADING
  done
}

next_policy() { # next_policy dpo|finetune FLAGS...: train $policy on, and answer the test problems
  local train=$1 k
  shift
  for ((k = 1; k <= RETRAINS; k++)); do
    $train "$name/train_$k" "$dir/model_$k" $((seed + 1000 * (k - 1))) "$@"
    answer "$name" "$dir" "$dir/model_$k" $k $LOADING
  done
  policy=$dir/model_1
}

cross_label() { # the round's proposals: a model of each half of $labels answers the other half
  local half
  for half in 1 2; do
    finetune "$name/half_$half" "$dir/half_$half" "$seed" "$strong" "$labels" "$SFT_LR" \
      --task "$TASK" --half $half --round $round
  done
  stage "$name/propose" generate.py --model "$dir/half_1" "$dir/half_2" --data "$labels" \
    --half 2 1 --out "$dir/proposals_1.jsonl" "$dir/proposals_2.jsonl" --source proposal \
    --round $round --seed "$seed" $decoding $PROPOSING $LOADING
}

sample() {     # sample N: N answers of $policy to every problem of D_unlab
  stage "$name/sample" generate.py --model "$policy" --data "$data/unlab.jsonl" --num-samples "$1" \
    --temperature "$DPO_TEMPERATURE" --seed $((seed + 1000 * round)) --source policy \
    --out "$dir/samples.jsonl" $decoding $LOADING
}

compare() {    # compare A [B...]: the judge on pairs of A and B, or on A's samples two by two
  local a=$1
  shift
  stage "$name/compare" compare.py score --judge "$judge" --task "$TASK" --a "$a" ${1+--b "$@"} \
    --out "$dir/comparisons.jsonl" $scoring ${EMBEDDER:+--embedder "$EMBEDDER"} \
    ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"} ${errs:+$errs --seed "$seed"} \
    --flip-share "$JUDGE_FLIPS" --flip-kind "$FLIP_KIND" --seconds-per-pair "$SECONDS_PER_PAIR"
}

refine() {     # refine NAME METHOD OUT ALPHA FLAGS...: new labels, or pairs for DPO
  local name=$1 method=$2 out=$3 alpha=$4
  shift 4
  stage "$name" refine.py --method "$method" --task "$TASK" --max-replace "$alpha" --out "$out" \
    --seed "$seed" "$@"
}

# ---------------------------------------------------------------- base models: given, or of bases/
weak=$WEAK_MODEL strong=$STRONG_MODEL
base_models                    # $weak and $strong; a pair that bases/ lacks is made first

for seed in $SEEDS; do
  at=seed_$seed run=$OUT/seed_$seed data=$OUT/seed_$seed/data questions=$data/$EVAL.jsonl

  # ---------------------------------------------------------------- data: D_gt and D_unlab
  stage data "tasks/$TASK.py" --out "$data" --train "$TRAIN" --gt "$GT" --test "$TEST" \
    --seed "$seed" ${DATA_DIR:+--data-dir "$DATA_DIR"} $DATA_FLAGS

  # ---------------------------------------------------------------- the weak side, from D_gt
  weak_sft weak/train "$run/weak/model" "$data/gt.jsonl"
  judge_samples                # of its checkpoints: $samples, of the models $checkpoints
  demonstrator=$run/weak/model
  if [ "$WEAK_ACCURACY" != 0 ]; then
    demonstrator=$run/weak/labeler
    stage weak/pick evaluate.py pick --task "$TASK" --data "${samples[@]}" \
      --models "${checkpoints[@]}" --accuracy "$WEAK_ACCURACY" --out "$demonstrator"
  fi
  stage weak/label generate.py --model "$demonstrator" --data "$data/unlab.jsonl" \
    --out "$run/weak/labels.jsonl" --source weak --seed "$seed" $decoding $LABELING
  grade_labels weak "$run/weak"
  answer weak "$run/weak" "$demonstrator" 1
  judge=$JUDGE told=''         # told: what tells a loss of the judge's errors
  if [ "$JUDGE" = trained ]; then
    judge=$run/judge/model
    stage judge/train compare.py train --model "$weak" --task "$TASK" \
      --gold "$data/gt.jsonl" --data "${samples[@]}" --out "$judge" --lr "$JUDGE_LR" \
      --epochs "$JUDGE_EPOCHS" --batch-size "$JUDGE_BATCH" --optimizer "$JUDGE_OPTIMIZER" \
      --wrong-per-problem "$JUDGE_WRONG" --stop-accuracy "$JUDGE_ACCURACY" --seed "$seed" \
      $TRAINING $JUDGE_PACKING
    [ "$JUDGE_FLIPS" != 0 ] || told=$judge
  fi

  # ---------------------------------------------------------------- SFT: round 0 of every method
  first_labels                 # $start: the weak model's labels, or what a setting makes of them
  retrain sft "$run/sft" "$start"

  # ---------------------------------------------------------------- ILR, and naive ILR
  for method in ilr naive; do
    wants $method || continue
    labels=$start
    for ((round = 1; round <= ROUNDS; round++)); do
      name=${method}_$round dir=$run/${method}_$round
      proposals=("$dir/proposals_1.jsonl" "$dir/proposals_2.jsonl")
      cross_label
      if [ $method = naive ]; then
        refine "$name/refine" naive "$dir/labels.jsonl" "$ALPHA" --labels "$labels" --round $round \
          --proposals "${proposals[@]}"
      else
        compare "$labels" "${proposals[@]}"
        refine "$name/refine" "$accept" "$dir/labels.jsonl" "$ALPHA" --labels "$labels" \
          --round $round --comparisons "$dir/comparisons.jsonl"
      fi
      labels=$dir/labels.jsonl
      grade_labels "$name" "$dir"
      retrain "$name" "$dir" "$labels"
    done
  done

  # ---------------------------------------------------------------- DPO
  policy=$run/sft/model_1
  if wants dpo; then
    for ((round = 1; round <= ROUNDS; round++)); do
      name=dpo_$round dir=$run/dpo_$round
      sample "$DPO_SAMPLES"
      compare "$dir/samples.jsonl"
      refine "$name/pairs" pairs "$dir/preferences.jsonl" "$DPO_ALPHA" \
        --comparisons "$dir/comparisons.jsonl"
      next_policy dpo ${told:+--judge "$told"}
    done
  fi

  # ---------------------------------------------------------------- baselines, and the ceiling
  run_baselines                # the methods of baselines/: each file says what a round of it is
  retrain gold "$run/gold" "$data/unlab.jsonl"
done

at=''
stage report evaluate.py report "$OUT"
run_plan
