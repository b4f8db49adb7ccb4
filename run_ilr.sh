#!/usr/bin/env bash
# Iterative label refinement and DPO under unreliable supervision, from data to report.
#
#   bash run_ilr.sh [TASK]        TASK=arithmetic (default; two CPU cores, minutes)
#   bash run_ilr.sh --help        the variables that override
#   bash run_ilr.sh --dry-run     print every stage's command, in order, and run none
#
# A run that is started again skips what is complete and continues what was cut off.
set -euo pipefail
cd "$(dirname "$0")"

DRY=0
for word in "$@"; do
  case $word in
    --dry-run) DRY=1 ;;
    --help|-h) HELP=1 ;;
    -*) echo "run_ilr.sh: error: unknown option $word; try --help" >&2; exit 2 ;;
    *) TASK=$word ;;
  esac
done

# ---------------------------------------------------------------- settings: each may be overridden by the environment
TASK=${TASK:-arithmetic}          # a file of tasks/
OUT=${OUT:-runs/$TASK}            # the run folder
SEEDS=${SEEDS:-0}                 # data seeds, one after the other
METHODS=${METHODS:-ilr dpo}       # of: ilr dpo
ROUNDS=${ROUNDS:-3}
RETRAINS=${RETRAINS:-1}           # trainings per reported point, with different data orders
EVAL=${EVAL:-test}                # test, or validation while choosing settings
ALPHA=${ALPHA:-0.15}              # share of the disagreements that ILR may replace
DPO_ALPHA=${DPO_ALPHA:-0.15}      # share of all pairs that DPO trains on, the judge's surest
BETA=${BETA:-0.1}                 # DPO's pull towards its reference
JUDGE=${JUDGE:-trained}           # trained, or oracle
JOBS=${JOBS:-2}                   # 2: run independent stages side by side (CPU); 1: one after the other (one GPU)
THREADS=${THREADS:-1}             # CPU threads of each stage
STATE_EVERY=${STATE_EVERY:-10}     # seconds between a training's resumable states
BASES=${BASES:-bases}             # where base models trained here are cached
PYTHON=${PYTHON:-python}

case $TASK in
  arithmetic)
    TRAIN=${TRAIN:-4000} GT=${GT:-1000} TEST=${TEST:-1000}       # problems: D_gt and D_unlab together, D_gt, test
    PRETRAIN=${PRETRAIN:-30000} PRETRAIN_WEAK=${PRETRAIN_WEAK:-15000}   # solved problems the base models read
    WEAK_LR=${WEAK_LR:-2e-3} WEAK_EPOCHS=${WEAK_EPOCHS:-6}
    SFT_LR=${SFT_LR:-1e-3} SFT_EPOCHS=${SFT_EPOCHS:-2} SFT_BATCH=${SFT_BATCH:-16}
    JUDGE_LR=${JUDGE_LR:-1e-3} JUDGE_EPOCHS=${JUDGE_EPOCHS:-3} JUDGE_BATCH=${JUDGE_BATCH:-32}
    DPO_LR=${DPO_LR:-5e-5} DPO_EPOCHS=${DPO_EPOCHS:-2} DPO_BATCH=${DPO_BATCH:-32} DPO_SAMPLES=${DPO_SAMPLES:-6}
    PACKING="--row-tokens 128 --micro-tokens 2048"
    PRETRAINING="--optimizer muon --lr 0.01 --epochs 1 --batch-size 16 --warmup 0.02 --prompt-weight 0.1 $PACKING"
    DECODING="--max-new-tokens 56 --batch-size 512"
    SCORING="--row-tokens 256 --micro-tokens 4096"
    WEAK_MODEL=${WEAK_MODEL:-} STRONG_MODEL=${STRONG_MODEL:-} ;;   # empty: trained here
  *) echo "run_ilr.sh: error: unknown task $TASK; choose from: arithmetic" >&2; exit 2 ;;
esac
VARIABLES="TASK SEEDS METHODS ROUNDS RETRAINS EVAL ALPHA DPO_ALPHA BETA JUDGE THREADS TRAIN GT TEST PRETRAIN
PRETRAIN_WEAK WEAK_MODEL STRONG_MODEL WEAK_LR WEAK_EPOCHS SFT_LR SFT_EPOCHS SFT_BATCH JUDGE_LR JUDGE_EPOCHS JUDGE_BATCH DPO_LR
DPO_EPOCHS DPO_BATCH DPO_SAMPLES"

if [ "${HELP:-0}" = 1 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  echo; echo "Variables and their present values:"
  for name in OUT $VARIABLES JOBS STATE_EVERY BASES PYTHON; do printf '  %-14s %s\n' "$name" "${!name}"; done
  exit
fi
PACKING="$PACKING --state-every $STATE_EVERY"
export OMP_NUM_THREADS=$THREADS TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1

# ---------------------------------------------------------------- running stages
# stage NAME TARGET COMMAND...: run a command unless its target is there; its summary goes to the screen and log.txt,
# its progress bar to the screen, its seconds to times.jsonl.
stage() {
  local name=$1 target=$2 start=$SECONDS; shift 2
  if [ "$DRY" = 1 ]; then printf '%q ' "$@"; echo; return; fi
  echo "$name" >>"$OUT/.progress"
  local place; place="[$(wc -l <"$OUT/.progress")/$TOTAL $(printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)))]"
  if [ -e "$target" ]; then echo "$place $name: complete"; return; fi
  echo "$place $name"
  local status=0 said=$OUT/.stage.$BASHPID
  echo "\$ $*" >>"$OUT/log.txt"
  if [ -t 2 ]; then "$@" >"$said.out" || status=$?
  else "$@" >"$said.out" 2>"$said.err" || status=$?; fi
  cat "$said.out" >>"$OUT/log.txt"; tail -n 1 "$said.out" | sed 's/^/    /'
  if [ $status != 0 ]; then
    tr '\r' '\n' <"$said.err" 2>/dev/null | tail -n 5 >&2 || true
    echo "run_ilr.sh: error: stage $name failed (exit $status); the same command continues from here" >&2
  else
    echo "{\"stage\": \"$name\", \"seconds\": $((SECONDS - start))}" >>"$OUT/times.jsonl"
  fi
  rm -f "$said.out" "$said.err"
  return $status
}

# lanes A B ...: run functions side by side (JOBS=2) or in turn. A lane is a process group of its own, so that one that
# fails, or an interrupt, ends the others with all their children.
LANES=()
lanes() {
  if [ "$JOBS" -lt 2 ] || [ "$DRY" = 1 ]; then for lane in "$@"; do $lane; done; return; fi
  set -m
  for lane in "$@"; do ( set +m; $lane ) & LANES+=($!); done
  set +m
  for lane in "$@"; do wait -n || exit $?; done
  LANES=()
}
trap 'for lane in "${LANES[@]}"; do kill -- "-$lane" 2>/dev/null || true; done' EXIT
trap 'exit 130' INT TERM


# ---------------------------------------------------------------- the base models, trained here from random weights
pretrain() {   # pretrain NAME RECORDS: a base model from the first RECORDS of the corpus
  local head=$bases/corpus_$1.jsonl
  [ "$DRY" = 1 ] || [ -e "$head" ] || { head -n "$2" "$bases/corpus.jsonl" >"$head.writing" && mv "$head.writing" "$head"; }
  stage "bases/$1" "$bases/$1" "$PYTHON" sft.py --init-config "$bases/$1.json" --tokenizer "$bases/tokenizer" \
    --data "$head" --out "$bases/$1" $PRETRAINING --state-every "$STATE_EVERY"
}
pretrain_strong() { pretrain strong 1000000000; }
pretrain_weak() { pretrain weak "$PRETRAIN_WEAK"; }

base_models() {
  if [ "$WEAK_MODEL" ] && [ "$STRONG_MODEL" ]; then return; fi
  local recipe; recipe=$(cat tasks/arithmetic.py <(echo "$PRETRAIN $PRETRAIN_WEAK $PRETRAINING") | cksum | cut -d' ' -f1)
  bases=$BASES/$TASK-$recipe
  stage bases/corpus "$bases/corpus.jsonl" "$PYTHON" "tasks/$TASK.py" --pretrain "$PRETRAIN" --out "$bases"
  lanes pretrain_strong pretrain_weak
  WEAK_MODEL=$bases/weak STRONG_MODEL=$bases/strong
}

# ---------------------------------------------------------------- the method, one function per step
sft() { local name=$1 out=$2; shift 2; stage "$name" "$out" "$PYTHON" sft.py --out "$out" --seed "$seed" $PACKING "$@"; }

answer() {     # answer NAME DIR MODELS: test answers of a point's models, graded
  local name=$1 dir=$2 outs=() k=0; shift 2
  for _ in "$@"; do k=$((k + 1)); outs+=("$dir/eval_$k.jsonl"); done
  stage "$name/answer" "$dir/eval_$k.jsonl" "$PYTHON" generate.py --model "$@" --data "$data/$EVAL.jsonl" --out "${outs[@]}" $DECODING
  for k in "${!outs[@]}"; do
    stage "$name/grade" "${outs[k]%.jsonl}.graded.jsonl" "$PYTHON" evaluate.py grade --task "$TASK" --data "${outs[k]}" \
      --out "${outs[k]%.jsonl}.graded.jsonl"
  done
}

grade_labels() { stage "$1/grade_labels" "$2/labels.graded.jsonl" "$PYTHON" evaluate.py grade --task "$TASK" \
  --data "$2/labels.jsonl" --out "$2/labels.graded.jsonl"; }

retrained() {  # retrained NAME DIR LABELS: RETRAINS strong models on the same labels, and their test answers
  local name=$1 dir=$2 labels=$3 models=() r
  for ((r = 1; r <= RETRAINS; r++)); do
    stage "$name/train" "$dir/model_$r" "$PYTHON" sft.py --model "$STRONG_MODEL" --data "$labels" --task "$TASK" --out "$dir/model_$r" \
      --lr "$SFT_LR" --epochs "$SFT_EPOCHS" --batch-size "$SFT_BATCH" --seed $((seed + 1000 * (r - 1))) $PACKING
    models+=("$dir/model_$r")
  done
  answer "$name" "$dir" "${models[@]}"
}

weak_model() {     # unreliable demonstrations: the weak model's answers are the labels of round 0
  sft "$at/weak/train" "$run/weak/model" --model "$WEAK_MODEL" --data "$data/gt.jsonl" --lr "$WEAK_LR" --epochs "$WEAK_EPOCHS" \
    --batch-size 16 --save-every 0.1
  stage "$at/weak/label" "$run/weak/labels.jsonl" "$PYTHON" generate.py --model "$run/weak/model" --data "$data/unlab.jsonl" \
    --out "$run/weak/labels.jsonl" --source weak $DECODING
}

judge_model() {    # unreliable judge: trained on what the weak model's checkpoints answer where references are known
  local models=() outs=() p
  for p in 10 20 30 40 50 60 70 80 90 100; do
    if [ $p = 100 ]; then models+=("$run/weak/model"); else models+=("$run/weak/model/checkpoint-$p"); fi
    outs+=("$run/judge/samples_$p.jsonl")
  done
  stage "$at/judge/sample" "$run/judge/samples_100.jsonl" "$PYTHON" generate.py --model "${models[@]}" --data "$data/gt.jsonl" \
    --out "${outs[@]}" --temperature 0.6 --seed "$seed" --source checkpoint $DECODING
  stage "$at/judge/train" "$run/judge/model" "$PYTHON" compare.py train --model "$WEAK_MODEL" --task "$TASK" --data "${outs[@]}" \
    --gold "$data/gt.jsonl" --out "$run/judge/model" --lr "$JUDGE_LR" --epochs "$JUDGE_EPOCHS" --batch-size "$JUDGE_BATCH" \
    --seed "$seed" $PACKING
  answer "$at/weak" "$run/weak" "$run/weak/model"
}

start_models() {   # SFT on the unreliable labels, and the ceiling: SFT on gold labels of the same problems
  grade_labels "$at/weak" "$run/weak"
  retrained "$at/sft" "$run/sft" "$run/weak/labels.jsonl"
  retrained "$at/gold" "$run/gold" "$data/unlab.jsonl"
}

refinement() {     # refinement METHOD ROUND: cross-labelling, comparison, refinement, retraining
  local name=$at/$1_$2 dir=$run/$1_$2 labels=$run/$1_$(($2 - 1))/labels.jsonl half
  [ "$2" -gt 1 ] || labels=$run/weak/labels.jsonl
  for half in 1 2; do
    sft "$name/half_$half" "$dir/half_$half" --model "$STRONG_MODEL" --data "$labels" --task "$TASK" --half $half --round "$2" \
      --lr "$SFT_LR" --epochs "$SFT_EPOCHS" --batch-size "$SFT_BATCH"
  done
  stage "$name/propose" "$dir/proposals_2.jsonl" "$PYTHON" generate.py --model "$dir/half_1" "$dir/half_2" --data "$labels" \
    --half 2 1 --round "$2" --seed "$seed" --out "$dir/proposals_1.jsonl" "$dir/proposals_2.jsonl" --source proposal $DECODING
  stage "$name/compare" "$dir/comparisons.jsonl" "$PYTHON" compare.py score --judge "$judge" --task "$TASK" --a "$labels" \
    --b "$dir/proposals_1.jsonl" "$dir/proposals_2.jsonl" --out "$dir/comparisons.jsonl" $SCORING
  stage "$name/refine" "$dir/labels.jsonl" "$PYTHON" refine.py --labels "$labels" --comparisons "$dir/comparisons.jsonl" \
    --task "$TASK" --method "$accept" --max-replace "$ALPHA" --round "$2" --out "$dir/labels.jsonl"
  grade_labels "$name" "$dir"
  retrained "$name" "$dir" "$dir/labels.jsonl"
}

preference() {     # preference ROUND: samples of the policy, comparison, the surest pairs, DPO
  local name=$at/dpo_$1 dir=$run/dpo_$1 policy=$run/dpo_$(($1 - 1))/model_1 models=() r
  [ "$1" -gt 1 ] || policy=$run/sft/model_1
  stage "$name/sample" "$dir/samples.jsonl" "$PYTHON" generate.py --model "$policy" --data "$data/unlab.jsonl" --temperature 0.7 \
    --num-samples "$DPO_SAMPLES" --seed "$((seed + 1000 * $1))" --source policy --out "$dir/samples.jsonl" $DECODING
  stage "$name/compare" "$dir/comparisons.jsonl" "$PYTHON" compare.py score --judge "$judge" --task "$TASK" \
    --a "$dir/samples.jsonl" --out "$dir/comparisons.jsonl" $SCORING
  stage "$name/pairs" "$dir/preferences.jsonl" "$PYTHON" refine.py --method pairs --comparisons "$dir/comparisons.jsonl" --task "$TASK" \
    --max-replace "$DPO_ALPHA" --seed "$seed" --out "$dir/preferences.jsonl"
  for ((r = 1; r <= RETRAINS; r++)); do
    stage "$name/train" "$dir/model_$r" "$PYTHON" dpo.py --model "$policy" --data "$dir/preferences.jsonl" --out "$dir/model_$r" --beta "$BETA" \
      --lr "$DPO_LR" --epochs "$DPO_EPOCHS" --batch-size "$DPO_BATCH" --seed $((seed + 1000 * (r - 1))) $PACKING
    models+=("$dir/model_$r")
  done
  answer "$name" "$dir" "${models[@]}"
}

method_ilr() { local round; for ((round = 1; round <= ROUNDS; round++)); do refinement ilr $round; done; }
method_dpo() { local round; for ((round = 1; round <= ROUNDS; round++)); do preference $round; done; }

# ---------------------------------------------------------------- the run
pipeline() {
  base_models
  local seed run data at judge
  for seed in $SEEDS; do
    at=seed_$seed run=$OUT/seed_$seed data=$OUT/seed_$seed/data
    judge=$run/judge/model
    [ "$JUDGE" = trained ] || judge=$JUDGE
    stage "$at/data" "$data/test.jsonl" "$PYTHON" "tasks/$TASK.py" --out "$data" --train "$TRAIN" --gt "$GT" --test "$TEST" --seed "$seed"
    weak_model
    lanes judge_model start_models
    lanes $(for method in $METHODS; do echo "method_$method"; done)
  done
}

if [ "$JUDGE" = oracle ]; then accept=oracle; else accept=ilr; fi
if [ "$DRY" = 1 ]; then pipeline; exit; fi
mkdir -p "$OUT"
if command -v flock >/dev/null; then
  exec 9>"$OUT/.lock"
  flock -n 9 || { echo "run_ilr.sh: error: $OUT is in use by another run (or a stage that one left behind)" >&2; exit 1; }
fi
settings=()
for name in $VARIABLES; do settings+=("$name=${!name}"); done
"$PYTHON" evaluate.py config "$OUT" "${settings[@]}"
: >"$OUT/.progress"
rm -f "$OUT"/.stage.*
TOTAL=$(DRY=1; pipeline | wc -l)
pipeline
# all is complete: what a stage that was killed between its last two steps left behind
find "$OUT" \( -name '.*.partial' -o -name '.*.writing' \) -prune -exec rm -rf {} +
"$PYTHON" evaluate.py report "$OUT"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $OUT/report.md"
