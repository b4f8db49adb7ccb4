#!/usr/bin/env bash
# Iterative label refinement and DPO under unreliable supervision, from data to report.
#
#   bash run_ilr.sh [TASK]        TASK=arithmetic (default; two CPU cores, minutes), or the paper's tasks and models (GPU):
#                                 gsm8k, bird, saferpaca, gsm8k-70b
#   bash run_ilr.sh --help        the variables that override
#   bash run_ilr.sh --dry-run     print every stage's command, in order, and run none
#
# A run that is started again skips what is complete and continues what was cut off.
set -euo pipefail
[ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -ge 44 ] || { echo "run_ilr.sh: error: needs bash 4.4 or newer, this is $BASH_VERSION" >&2; exit 1; }
cd "$(dirname "$0")"

DRY=0
for word in "$@"; do
  case $word in
    --dry-run) DRY=1 ;;
    --help|-h) HELP=1 ;;
    -*) echo "run_ilr.sh: error: unknown option $word; try --help" >&2; exit 2 ;;
    *=*) echo "run_ilr.sh: error: $word: variables go first: $word bash run_ilr.sh" >&2; exit 2 ;;
    *) [ -z "${GIVEN:-}" ] || { echo "run_ilr.sh: error: two tasks, $GIVEN and $word: one run is of one" >&2; exit 2; }
      GIVEN=$word TASK=$word ;;
  esac
done

# ---------------------------------------------------------------- settings: each may be overridden by the environment
TASK=${TASK:-arithmetic}          # a file of tasks/, or gsm8k-70b
PRESET=$TASK TASK=${TASK/#gsm8k-70b/gsm8k}
OUT=${OUT:-runs/$PRESET}          # the run folder
SEEDS=${SEEDS:-0}                 # data seeds, one after the other
METHODS=${METHODS:-ilr dpo}       # of: ilr dpo naive dpo-labels filter rft steer ensemble sft-chosen spin dpo-release dpo-coin (README, Baselines)
ROUNDS=${ROUNDS:-3}
RETRAINS=${RETRAINS:-1}           # trainings per reported point, with different data orders
EVAL=${EVAL:-test}                # test, or validation while choosing settings
ALPHA=${ALPHA:-0.15}              # share of the disagreements that ILR may replace
DPO_ALPHA=${DPO_ALPHA:-0.15}      # share of all pairs that DPO trains on, the judge's surest
BETA=${BETA:-0.1}                 # DPO's pull towards its reference
DPO_LOSS=${DPO_LOSS:-sigmoid}     # or cdpo, rdpo (both told of the judge's errors), ipo, hinge, asft (which has no BETA)
DPO_NLL=${DPO_NLL:-0}             # weight of the chosen answers' likelihood in DPO's loss
JUDGE=${JUDGE:-trained}           # trained, oracle, human, or the URL of an OpenAI-compatible endpoint
JUDGE_MODEL=${JUDGE_MODEL:-}      # the model behind that URL
JUDGE_FLIPS=${JUDGE_FLIPS:-0}     # share of the judge's answers that are turned round
LABEL_NOISE=${LABEL_NOISE:-}      # demonstrations are references, this share of them wrong; empty: the weak model's
FLIP_KIND=${FLIP_KIND:-symmetric} # both by chance (symmetric), or all answers about the same problems, and labels as the weak model errs (systematic)
SECONDS_PER_PAIR=${SECONDS_PER_PAIR:-60}   # what a person has for each answer
case $PRESET in bird|gsm8k-70b) LORA_RANK=${LORA_RANK:-64} LOAD_IN_4BIT=${LOAD_IN_4BIT:-1} ;; esac    # 70B on one GPU
LORA_RANK=${LORA_RANK:-0}         # of SFT and DPO; 0 trains every weight
LOAD_IN_4BIT=${LOAD_IN_4BIT:-0}   # 1: the strong model in 4 bits
CHAT_TEMPLATE=${CHAT_TEMPLATE:-0} # 1: both models are chat models and get their own prompt format
CLEAN_START=${CLEAN_START:-0}     # 1: SFT and ILR start from the unreliable labels that are right
JOBS=${JOBS:-$(command -v nvidia-smi >/dev/null && echo 1 || echo 4)}   # stages side by side: 1 on one GPU, 4 on a CPU
THREADS=${THREADS:-1}             # CPU threads of each stage
NPROC=${NPROC:-1}                 # processes of each model stage, one a GPU, started by torchrun; above 1, stages run one after the other
LAUNCH=${LAUNCH:-}                # what starts them instead, words: srun torchrun ... for several machines (README), with NPROC above 1
BASES=${BASES:-bases}             # where base models trained here are cached
PYTHON=${PYTHON:-python}

case $TASK in
  arithmetic)
    TRAIN=${TRAIN:-3500} GT=${GT:-2000} TEST=${TEST:-1000}       # problems: D_gt and D_unlab together, D_gt, test
    PRETRAIN=${PRETRAIN:-26000} PRETRAIN_WEAK=${PRETRAIN_WEAK:-16000}   # solved problems the base models read
    WEAK_LR=${WEAK_LR:-3e-4} WEAK_EPOCHS=${WEAK_EPOCHS:-2} WEAK_BATCH=${WEAK_BATCH:-16}
    CHECKPOINTS=${CHECKPOINTS:-30 40 50 60 70 80 90}   # percent of weak SFT; the first two write nothing that can be parsed
    WEAK_ACCURACY=${WEAK_ACCURACY:-0.45}        # the demonstrator is the checkpoint whose samples come nearest; 0: the last
    SFT_LR=${SFT_LR:-4e-3} SFT_EPOCHS=${SFT_EPOCHS:-2} SFT_BATCH=${SFT_BATCH:-14}
    JUDGE_LR=${JUDGE_LR:-3e-3} JUDGE_EPOCHS=${JUDGE_EPOCHS:-6} JUDGE_BATCH=${JUDGE_BATCH:-16} JUDGE_OPTIMIZER=${JUDGE_OPTIMIZER:-muon}
    JUDGE_WRONG=${JUDGE_WRONG:-4} JUDGE_ACCURACY=${JUDGE_ACCURACY:-0.8}   # its training stops at this accuracy; 0: as good as it gets
    DPO_LR=${DPO_LR:-1e-5} DPO_EPOCHS=${DPO_EPOCHS:-2} DPO_BATCH=${DPO_BATCH:-32} DPO_SAMPLES=${DPO_SAMPLES:-6}
    CHOSEN_LR=${CHOSEN_LR:-3e-4}                # SFT on what the judge chose goes on from a finished SFT, at less than a tenth of its rate
    PACKING="--row-tokens 128 --micro-tokens 2048"
    PRETRAINING="--optimizer muon --lr 0.01 --epochs 1 --batch-size 16 --warmup 0.02 --prompt-weight 0.1 $PACKING"
    DPO_TEMPERATURE=${DPO_TEMPERATURE:-0.7} STATE_EVERY=${STATE_EVERY:-10}    # seconds between a training's resumable states
    OWN="PRETRAIN PRETRAIN_WEAK" PREPARE=() EVALS="test|validation"
    JUDGING="--micro-tokens 1024" PREFERRING="" PROPOSING="" LABELING=""
    DECODING="--max-new-tokens 56 --batch-size 128"
    SCORING="--row-tokens 256 --micro-tokens 4096"
    WEAK_MODEL=${WEAK_MODEL:-} STRONG_MODEL=${STRONG_MODEL:-} ;;   # empty: trained here
  gsm8k|bird|saferpaca) # the paper's models and numbers; LORA_RANK=64 is the paper's, the learning rates of full finetuning are untried
    OWN="DATA_DIR PACKING DECODING" EPOCHS=2 TOKENS=256 PROPOSING="--num-beams 4" LABELING="" EVALS="test" WEAK_LORA_LR=5e-4 SAMPLING=0.7
    case $PRESET in
      gsm8k*) TRAIN=${TRAIN:-7473} GT=${GT:-3736} TEST=${TEST:-1319} EVALS="test|validation|platinum" ;;
      bird) TRAIN=${TRAIN:-9428} GT=${GT:-4714} TEST=${TEST:-1534} STRONG_MODEL=${STRONG_MODEL:-meta-llama/Meta-Llama-3-70B} ;;
      saferpaca) TRAIN=${TRAIN:-20000} GT=${GT:-0} TEST=${TEST:-578} EPOCHS=4 TOKENS=512 PROPOSING="--temperature 1.0" LABELING=$PROPOSING SAMPLING=1.0
        OWN+=" EMBEDDER ILR_EMBEDDER_MODEL ILR_JUDGE_URL ILR_JUDGE_MODEL" ILR_JUDGE_URL=${ILR_JUDGE_URL:-} ILR_JUDGE_MODEL=${ILR_JUDGE_MODEL:-}
        ILR_EMBEDDER_MODEL=${ILR_EMBEDDER_MODEL:-text-embedding-3-large}
        EMBEDDER=${EMBEDDER:-sentence-transformers/all-mpnet-base-v2} ;;     # the paper's is an endpoint's: https://api.openai.com/v1
    esac
    case $PRESET in *-70b) WEAK_LORA_LR=1e-4 WEAK_MODEL=${WEAK_MODEL:-mistralai/Mistral-7B-v0.1} STRONG_MODEL=${STRONG_MODEL:-meta-llama/Meta-Llama-3-70B} ;; esac
    if [ "$LORA_RANK" = 0 ]; then WEAK_LR=${WEAK_LR:-2e-5} SFT_LR=${SFT_LR:-1e-5}; else WEAK_LR=${WEAK_LR:-$WEAK_LORA_LR} SFT_LR=${SFT_LR:-1e-4}; fi
    CHOSEN_LR=${CHOSEN_LR:-$SFT_LR}
    STRONG_MODEL=${STRONG_MODEL:-mistralai/Mistral-7B-v0.1}
    WEAK_MODEL=${WEAK_MODEL:-google/gemma-2b} WEAK_EPOCHS=${WEAK_EPOCHS:-$EPOCHS} WEAK_BATCH=${WEAK_BATCH:-32}
    CHECKPOINTS=${CHECKPOINTS:-10 20 30 40 50 60 70 80 90} WEAK_ACCURACY=${WEAK_ACCURACY:-0}
    SFT_EPOCHS=${SFT_EPOCHS:-$EPOCHS} SFT_BATCH=${SFT_BATCH:-32}
    JUDGE_LR=${JUDGE_LR:-1e-6} JUDGE_EPOCHS=${JUDGE_EPOCHS:-5} JUDGE_BATCH=${JUDGE_BATCH:-16} JUDGE_OPTIMIZER=${JUDGE_OPTIMIZER:-auto}
    JUDGE_WRONG=${JUDGE_WRONG:-1} JUDGE_ACCURACY=${JUDGE_ACCURACY:-0}
    DPO_TEMPERATURE=${DPO_TEMPERATURE:-$SAMPLING} DPO_LR=${DPO_LR:-1e-6} DPO_EPOCHS=${DPO_EPOCHS:-$EPOCHS} DPO_BATCH=${DPO_BATCH:-32} DPO_SAMPLES=${DPO_SAMPLES:-6}
    STATE_EVERY=${STATE_EVERY:-900} DATA_DIR=${DATA_DIR:-data/$TASK}
    PREPARE=(--data-dir "$DATA_DIR")
    case $EVAL in validation) PREPARE+=(--validation 500) ;; platinum) PREPARE+=(--platinum) ;; esac
    PACKING=${PACKING:---row-tokens 2048 --micro-tokens 4096 --gradient-checkpointing} JUDGING="" PREFERRING="--optimizer rmsprop8bit"
    DECODING=${DECODING:---max-new-tokens $TOKENS --batch-size 256} SCORING="--row-tokens 2048 --micro-tokens 16384" ;;
  *) echo "run_ilr.sh: error: unknown task $TASK; choose from: arithmetic gsm8k bird saferpaca gsm8k-70b" >&2; exit 2 ;;
esac
VARIABLES="TASK SEEDS METHODS ROUNDS RETRAINS EVAL ALPHA DPO_ALPHA BETA DPO_LOSS DPO_NLL LORA_RANK LOAD_IN_4BIT CHAT_TEMPLATE JUDGE JUDGE_MODEL JUDGE_FLIPS LABEL_NOISE FLIP_KIND SECONDS_PER_PAIR CLEAN_START THREADS TRAIN GT TEST $OWN
WEAK_MODEL STRONG_MODEL WEAK_LR WEAK_EPOCHS WEAK_BATCH CHECKPOINTS WEAK_ACCURACY SFT_LR SFT_EPOCHS SFT_BATCH JUDGE_LR JUDGE_EPOCHS
JUDGE_BATCH JUDGE_OPTIMIZER JUDGE_WRONG JUDGE_ACCURACY CHOSEN_LR DPO_LR DPO_EPOCHS DPO_BATCH DPO_SAMPLES DPO_TEMPERATURE"

if [ "${HELP:-0}" = 1 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  echo; echo "Variables and their present values:"
  for name in OUT $VARIABLES JOBS NPROC LAUNCH STATE_EVERY BASES PYTHON; do
    means=$(grep -oE "^ *$name=.*# .*" "$0" | head -n 1 | sed 's/.*# //' || true)      # said where it is set
    printf '  %-16s %s%s\n' "$name" "${!name}" "${means:+   # $means}"
  done
  exit
fi
check() {     # check REGEX WHAT NAMES...: refuse a mistyped setting before anything is written
  local regex=$1 what=$2 name; shift 2
  for name in "$@"; do
    [[ ${!name} =~ ^$regex$ ]] || { echo "run_ilr.sh: error: $name is '${!name}': expected $what" >&2; exit 2; }
  done
}
check '[1-9]' 'a digit from 1 to 9' JOBS
check '[1-9][0-9]*' 'a whole number above 0' NPROC ROUNDS RETRAINS THREADS TRAIN TEST WEAK_EPOCHS WEAK_BATCH \
  SFT_EPOCHS SFT_BATCH JUDGE_EPOCHS JUDGE_BATCH JUDGE_WRONG DPO_EPOCHS DPO_BATCH DPO_SAMPLES
check '[0-9]+( +[0-9]+)*' 'whole numbers with spaces between' SEEDS
check '[1-9]0( +[1-9]0)*' 'tens below 100' CHECKPOINTS
check '(0(\.[0-9]+)?|1(\.0+)?)' 'a share between 0 and 1' ALPHA DPO_ALPHA WEAK_ACCURACY JUDGE_ACCURACY JUDGE_FLIPS
check '[0-9]*\.?[0-9]*[1-9][0-9]*(e-?[0-9]+)?' 'a number above 0' BETA
check '[0-9]*\.?[0-9]+(e-?[0-9]+)?' 'a number' DPO_NLL WEAK_LR SFT_LR JUDGE_LR CHOSEN_LR DPO_LR STATE_EVERY DPO_TEMPERATURE
check '[0-9]*\.?[0-9]*[1-9][0-9]*' 'seconds' SECONDS_PER_PAIR
url='https?://[^/@?#[:space:]]+(/[^@?#[:space:]]*)?'
check "(trained|oracle|human|$url)" 'trained, oracle, human or a URL without a user or a key in it' JUDGE
case $JUDGE in http*) check '.+' 'the model behind the URL of JUDGE' JUDGE_MODEL ;; esac
check '(sigmoid|cdpo|rdpo|ipo|hinge|asft)' 'one of sigmoid, cdpo, rdpo, ipo, hinge, asft' DPO_LOSS
case $DPO_LOSS in cdpo|rdpo)      # told of the judge's errors on its held-out pairs, which must be those of the preferences
  check trained "trained with DPO_LOSS=$DPO_LOSS, whose noise rate is that of a trained judge" JUDGE
  check '0(\.0*)?' "0 with DPO_LOSS=$DPO_LOSS, which would not know of the flips" JUDGE_FLIPS
  case " $METHODS " in *" spin "*|*" dpo-coin "*) echo "run_ilr.sh: error: METHODS: spin and dpo-coin ask no judge, DPO_LOSS=$DPO_LOSS needs one" >&2; exit 2 ;; esac ;;
esac
if [ "$TASK" = saferpaca ]; then
  check "($url)?" 'a URL without a user or a key in it' ILR_JUDGE_URL
  case $EMBEDDER in http*) check "$url" 'a URL without a user or a key in it' EMBEDDER ;; esac
  check '0' '0 (its grades cost money)' WEAK_ACCURACY
  [ -z "$LABEL_NOISE" ] || check symmetric 'symmetric with LABEL_NOISE (its grades cost money)' FLIP_KIND
  case " $METHODS " in *" ensemble "*) echo "run_ilr.sh: error: METHODS: ensemble votes, and saferpaca has no rule for when two answers agree" >&2; exit 2 ;; esac
fi
check "($EVALS)" "one of ${EVALS//|/, }" EVAL
ALL_METHODS="ilr dpo naive dpo-labels filter rft steer ensemble sft-chosen spin dpo-release dpo-coin"      # one that is read from first
check "(${ALL_METHODS// /|})( +(${ALL_METHODS// /|}))*" "some of these, with spaces between: $ALL_METHODS" METHODS
for method in $METHODS; do       # whose files a baseline reads
  case $method in dpo-labels|filter|rft|steer|ensemble) source=ilr ;; sft-chosen) source=dpo ;; *) source=$method ;; esac
  [[ " $METHODS " = *" $source "* ]] || { echo "run_ilr.sh: error: METHODS: $method needs $source beside it" >&2; exit 2; }
done
[ -z "$LABEL_NOISE" ] || { check '(0(\.[0-9]+)?|1(\.0+)?)' 'a share between 0 and 1, or nothing' LABEL_NOISE
  [ "$CLEAN_START" = 0 ] || { echo "run_ilr.sh: error: CLEAN_START=1 drops what LABEL_NOISE makes" >&2; exit 2; }; }
check '(symmetric|systematic)' 'symmetric or systematic' FLIP_KIND
check '[01]' '0 or 1' CLEAN_START LOAD_IN_4BIT CHAT_TEMPLATE
check '(0|[1-9][0-9]*)' 'a whole number' LORA_RANK GT
[ "$TASK" != arithmetic ] || { check '[1-9][0-9]*' 'a whole number above 0' $OWN; check 0 '0: its models know no chat' CHAT_TEMPLATE; }
TRAINING="$PACKING --state-every $STATE_EVERY" LOADING="" ASKING=(${EMBEDDER:+--embedder "$EMBEDDER"} ${JUDGE_MODEL:+--judge-model "$JUDGE_MODEL"})
if [ "$LOAD_IN_4BIT" = 1 ]; then
  check '[1-9].*' 'a rank above 0 with LOAD_IN_4BIT=1, whose weights cannot be trained' LORA_RANK
  LOADING="--load-in-4bit"
fi
# MODEL starts a stage that needs a model. One process trains adapters on 4-bit weights if asked, several on 16-bit shards, and with
# other optimizers than the 8-bit ones: so a run folder is of one process or of several, however many. Answers are of 4-bit weights.
MODEL=("$PYTHON") ADAPTING=$LOADING
[ -z "$LAUNCH" ] || [ "$NPROC" != 1 ] || { echo "run_ilr.sh: error: LAUNCH starts several processes: say how many, NPROC" >&2; exit 2; }
if [ "$NPROC" != 1 ]; then
  if [ "$LAUNCH" ]; then MODEL=($LAUNCH); else MODEL+=(-m torch.distributed.run --standalone --nproc-per-node "$NPROC"); fi
  JOBS=1 ADAPTING="" PREFERRING=${PREFERRING/8bit/} PROCESSES=several VARIABLES+=" PROCESSES"
fi
if [ "$JUDGE" = trained ]; then ASKED=("${MODEL[@]}"); else ASKED=("$PYTHON"); fi
[ "$CHAT_TEMPLATE" = 0 ] || TRAINING+=" --chat-template" DECODING+=" --chat-template" SCORING+=" --chat-template"
[[ $JUDGE_FLIPS =~ ^0(\.0*)?$ ]] || ASKING+=(--flip-share "$JUDGE_FLIPS" --flip-kind "$FLIP_KIND")
if [ "$JUDGE" = human ]; then
  [ "$DRY" = 1 ] || { : </dev/tty; } 2>/dev/null || { echo "run_ilr.sh: error: JUDGE=human needs a terminal" >&2; exit 2; }
  JOBS=1 ASKING+=(--seconds-per-pair "$SECONDS_PER_PAIR")     # one at a time, who may read from the terminal
fi
export OMP_NUM_THREADS=$THREADS TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1

# ---------------------------------------------------------------- running stages
# stage NAME TARGET COMMAND...: run a command unless its target is there, model stages as at most JOBS at a time (refining and
# grading take no time and wait for nobody). Its summary goes to the screen and log.txt, its progress bar to a terminal's line
# of its slot, its seconds to times.jsonl. LATER is its niceness: stages that nothing waits for give way to the longest path.
say() { [ ! -t 1 ] || printf '\r\033[J'; echo "$*"; }      # on a terminal, wipe the bars below first; they draw themselves again
stage() {
  local name=$1 target=$2 status=0 said=$OUT/.stage.$BASHPID slot place start again; shift 2
  if [ "$DRY" = 1 ]; then printf '%q ' "$@"; echo; return; fi
  if [ -e "$target" ]; then slot=none
  else case $2 in refine.py|evaluate.py|tasks/*) slot=0 ;; *) read -r -n 1 -u 8 slot ;; esac; fi
  echo "$name" >>"$OUT/.progress"
  place="[$(wc -l <"$OUT/.progress" | tr -d ' ')/$TOTAL $(printf '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60)))]"
  if [ $slot = none ]; then say "$place $name: complete"; return; fi
  say "$place $name"
  echo "\$ $*" >>"$OUT/log.txt"
  start=$SECONDS
  if [ -t 2 ]; then TQDM_POSITION=$slot TQDM_LEAVE='' nice -n "${LATER:-0}" "$@" >"$said.out" || status=$?
  else nice -n "${LATER:-0}" "$@" >"$said.out" 2>"$said.err" || status=$?; fi
  [ $slot = 0 ] || printf %s "$slot" >&8
  cat "$said.out" >>"$OUT/log.txt"
  [ ! -s "$said.out" ] || say "    $(tail -n 1 "$said.out")"
  if [ $status != 0 ]; then
    if [ -e "$said.err" ]; then
      tr '\r' '\n' <"$said.err" >"$said.out"
      # of several processes, their own words and not torchrun's, whose exit code is always 1
      { [ "$NPROC" != 1 ] && grep -aE '^([a-z]+\.py: error: |[A-Za-z]+Error: |  traceback : Signal)' "$said.out" || tail -n 5 "$said.out"; } >&2
      [ "$NPROC" = 1 ] || ! grep -aqE '^  exitcode +: 2 ' "$said.out" || status=2
    fi
    [ $status = 2 ] || again="; the same command continues from here"
    echo "run_ilr.sh: error: stage $name failed (exit $status)${again:-}" >&2
  else
    echo "{\"stage\": \"$name\", \"seconds\": $((SECONDS - start))}" >>"$OUT/times.jsonl"
  fi
  rm -f "$said.out" "$said.err"
  return $status
}

# lanes A B ...: run functions side by side, or in turn with JOBS=1, where their order must satisfy what they need. A lane
# is a process group of its own, so that one that fails, or an interrupt, ends the others with all their children.
LANES=()
end_lanes() {
  for lane in "${LANES[@]}"; do kill -- "-$lane" 2>/dev/null || true; done
  wait 2>/dev/null      # for their ends, which bash would else announce
}
trap end_lanes EXIT
trap 'echo "run_ilr.sh: interrupted; the same command continues from here" >&2; exit 130' INT TERM
lanes() {
  local lane
  if [ "$JOBS" -lt 2 ] || [ "$DRY" = 1 ]; then for lane in "$@"; do $lane; done; return; fi
  set -m
  for lane in "$@"; do
    ( set +m; LANES=(); trap end_lanes EXIT; trap 'exit 130' INT TERM; $lane ) & LANES+=($!)
  done
  set +m
  for lane in "$@"; do wait -n || exit $?; done
  LANES=()
}
needs() {      # needs FILE: wait for what another lane makes, unless run_ilr.sh itself is gone
  until [ "$DRY" = 1 ] || [ -e "$1" ]; do kill -0 $$ || exit 1; sleep 0.2; done
}

# ---------------------------------------------------------------- the base models, trained here from random weights
pretrain() {   # pretrain NAME
  stage "bases/$1" "$bases/$1" "${MODEL[@]}" sft.py --init-config "$bases/$1.json" --tokenizer "$bases/tokenizer" \
    --data "$bases/corpus_$1.jsonl" --out "$bases/$1" $PRETRAINING --state-every "$STATE_EVERY"
}
strong_base() { [ -z "$bases" ] || pretrain strong; }
weak_base() { [ -z "$bases" ] || pretrain weak; }

base_recipe() {   # names of the base models; a change of their recipe is another folder
  bases=
  if [ "$WEAK_MODEL" ] && [ "$STRONG_MODEL" ]; then return; fi
  bases=$BASES/$TASK-$(cat "tasks/$TASK.py" <(echo "$PRETRAIN $PRETRAIN_WEAK $PRETRAINING") | cksum | cut -d' ' -f1)
  WEAK_MODEL=$bases/weak STRONG_MODEL=$bases/strong
  if [ "$DRY" = 0 ] && ! { [ -e "$bases/strong" ] && [ -e "$bases/weak" ]; } && command -v flock >/dev/null; then
    mkdir -p "$bases"
    exec 7>"$bases/.lock"
    flock -n 7 || { echo "run_ilr.sh: error: another run is training $bases; start this one when it has" >&2; exit 1; }
  fi
  stage bases/corpora "$bases/corpus_weak.jsonl" "$PYTHON" "tasks/$TASK.py" --pretrain "$PRETRAIN" "$PRETRAIN_WEAK" --out "$bases"
}

# ---------------------------------------------------------------- the method, one function per step
train() {      # train NAME OUT MODEL DATA LR EPOCHS BATCH FLAGS...
  local name=$1 out=$2 model=$3 records=$4 lr=$5 epochs=$6 batch=$7; shift 7
  stage "$name" "$out" "${MODEL[@]}" sft.py --model "$model" --data "$records" --out "$out" --lr "$lr" --epochs "$epochs" \
    --batch-size "$batch" --lora-rank "$LORA_RANK" $TRAINING $ADAPTING "$@"
}

answer() {     # answer NAME DIR MODELS...: the test answers of a point's models, graded
  local name=$1 dir=$2 outs=() out k=0 _; shift 2
  for _ in "$@"; do k=$((k + 1)); outs+=("$dir/eval_$k.jsonl"); done
  stage "$name/answer" "$dir/eval_$k.jsonl" "${MODEL[@]}" generate.py --model "$@" --data "${questions:-$data/$EVAL.jsonl}" --out "${outs[@]}" $DECODING $LOADING
  for out in "${outs[@]}"; do grade "$name/grade" "${out%.jsonl}"; done
}

grade_labels() { [ "$TASK" = saferpaca ] || grade "$1/grade_labels" "$2/labels"; }     # where grading costs nothing
grade() { stage "$1" "$2.graded.jsonl" "$PYTHON" evaluate.py grade --task "$TASK" --data "$2.jsonl" --out "$2.graded.jsonl"; }

strong_models() {  # strong_models NAME DIR LABELS: RETRAINS strong models on the same labels, and their test answers
  local name=$1 dir=$2 labels=$3 models=() r
  for ((r = 1; r <= RETRAINS; r++)); do
    train "$name/train" "$dir/model_$r" "$STRONG_MODEL" "$labels" "$SFT_LR" "$SFT_EPOCHS" "$SFT_BATCH" --task "$TASK" \
      --seed $((seed + 1000 * (r - 1)))
    models+=("$dir/model_$r")
  done
  answer "$name" "$dir" "${models[@]}"
}

weak_samples() {   # weak_samples 0|1 SOURCE: what every other one of the weak models answers to D_gt
  local k models=() outs=()
  for ((k = $1; k < ${#samples[@]}; k += 2)); do models+=("${weak_models[k]}") outs+=("${samples[k]}"); done
  stage "$at/judge/sample_$1" "${outs[-1]}" "${MODEL[@]}" generate.py --model "${models[@]}" --data "$data/gt.jsonl" \
    --out "${outs[@]}" --temperature 0.6 --seed "$seed" --source "$2" $DECODING
}

weak_model() {     # weak_model NAME OUT DATA FLAGS...
  local name=$1 out=$2 records=$3; shift 3
  train "$name" "$out" "$WEAK_MODEL" "$records" "$WEAK_LR" "$WEAK_EPOCHS" "$WEAK_BATCH" --seed "$seed" "$@"
}

weak_side() {      # unreliable demonstrations and the unreliable judge, both from D_gt
  local labeler=$run/weak/model weak_models=() samples=() percent part LOADING="" ADAPTING=""
  weak_base
  weak_model "$at/weak/train" "$run/weak/model" "$data/gt.jsonl" --save-every 0.1
  if [ "$JUDGE" != trained ] && [ "$WEAK_ACCURACY" = 0 ]; then :
  elif [ "$TASK" = saferpaca ]; then     # its judge learns from weak models of one category each
    for part in general safety; do
      weak_model "$at/judge/train_$part" "$run/judge/$part" "$data/gt_$part.jsonl" --save-every 0.1
    done
    for percent in $CHECKPOINTS 100; do
      for part in general safety; do
        weak_models+=("$run/judge/$part/checkpoint-$percent") samples+=("$run/judge/samples_${part}_$percent.jsonl")
        [ "$percent" != 100 ] || weak_models[-1]=$run/judge/$part
      done
    done
    lanes "weak_samples 0 general" "weak_samples 1 safety"
  else
    for percent in $CHECKPOINTS; do
      weak_models+=("$run/weak/model/checkpoint-$percent") samples+=("$run/judge/samples_$percent.jsonl")
    done
    weak_models+=("$run/weak/model") samples+=("$run/judge/samples_100.jsonl")
    lanes "weak_samples 0 checkpoint" "weak_samples 1 checkpoint"
  fi
  if [ "$WEAK_ACCURACY" != 0 ]; then
    labeler=$run/weak/labeler
    stage "$at/weak/pick" "$labeler" "$PYTHON" evaluate.py pick --task "$TASK" --data "${samples[@]}" --models "${weak_models[@]}" \
      --accuracy "$WEAK_ACCURACY" --out "$labeler"
  fi
  stage "$at/weak/label" "$run/weak/labels.jsonl" "${MODEL[@]}" generate.py --model "$labeler" --data "$data/unlab.jsonl" \
    --out "$run/weak/labels.jsonl" --source weak --seed "$seed" $DECODING $LABELING
  grade_labels "$at/weak" "$run/weak"
  if [ "$LABEL_NOISE" ]; then
    stage "$at/noise" "$start" "$PYTHON" refine.py --method noise --labels "$run/weak/labels.jsonl" --proposals "$data/unlab.jsonl" --task "$TASK" \
      --share "$LABEL_NOISE" --kind "$FLIP_KIND" --seed "$seed" --out "$start"
    grade_labels "$at/noise" "$run/noise"
  elif [ "$CLEAN_START" = 1 ]; then
    stage "$at/clean" "$start" "$PYTHON" refine.py --method clean --labels "$run/weak/labels.jsonl" --task "$TASK" --out "$start"
    grade_labels "$at/clean" "$run/clean"
  fi
  [ "$JUDGE" != trained ] || stage "$at/judge/train" "$run/judge/model" "${MODEL[@]}" compare.py train --model "$WEAK_MODEL" --task "$TASK" --data "${samples[@]}" \
    --gold "$data/gt.jsonl" --out "$run/judge/model" --lr "$JUDGE_LR" --epochs "$JUDGE_EPOCHS" --batch-size "$JUDGE_BATCH" \
    --optimizer "$JUDGE_OPTIMIZER" --wrong-per-problem "$JUDGE_WRONG" --stop-accuracy "$JUDGE_ACCURACY" --seed "$seed" $TRAINING $JUDGING
  LATER=10 answer "$at/weak" "$run/weak" "$labeler"
}

start_models() {   # SFT on the unreliable labels, which is round 0 of every method
  local LATER=5    # the judge is what everything waits for
  needs "$start"; needs "$STRONG_MODEL"
  strong_models "$at/sft" "$run/sft" "$start"
}

ceiling() {        # SFT on gold labels of the same problems
  needs "$STRONG_MODEL"
  LATER=10 strong_models "$at/gold" "$run/gold" "$data/unlab.jsonl"
}

half_model() { train "$name/half_$1" "$dir/half_$1" "$STRONG_MODEL" "$labels" "$SFT_LR" "$SFT_EPOCHS" "$SFT_BATCH" \
  --task "$TASK" --half "$1" --round "$round" --seed "$seed"; }

refined_labels() { # refined_labels ilr|naive: each round, cross-labelling by two half-models, comparison, refinement
  local method=$1 round labels=$start name dir how LATER=5
  needs "$labels"; needs "$STRONG_MODEL"
  for ((round = 1; round <= ROUNDS; round++)); do
    name=$at/${method}_$round dir=$run/${method}_$round
    lanes "half_model 1" "half_model 2"
    stage "$name/propose" "$dir/proposals_2.jsonl" "${MODEL[@]}" generate.py --model "$dir/half_1" "$dir/half_2" --data "$labels" \
      --half 2 1 --round "$round" --seed "$seed" --out "$dir/proposals_1.jsonl" "$dir/proposals_2.jsonl" --source proposal \
      $DECODING $PROPOSING $LOADING
    if [ $method = naive ]; then how=(--method naive --proposals "$dir/proposals_1.jsonl" "$dir/proposals_2.jsonl" --seed "$seed")
    else
      how=(--method $accept --comparisons "$dir/comparisons.jsonl")
      [ "$JUDGE" != trained ] || needs "$judge"
      stage "$name/compare" "$dir/comparisons.jsonl" "${ASKED[@]}" compare.py score --judge "$judge" --task "$TASK" --a "$labels" \
        --b "$dir/proposals_1.jsonl" "$dir/proposals_2.jsonl" --out "$dir/comparisons.jsonl" $SCORING "${ASKING[@]}"
    fi
    stage "$name/refine" "$dir/labels.jsonl" "$PYTHON" refine.py --labels "$labels" "${how[@]}" --task "$TASK" \
      --max-replace "$ALPHA" --round "$round" --out "$dir/labels.jsonl"
    grade_labels "$name" "$dir"
    labels=$dir/labels.jsonl
  done
}

refined_models() { # refined_models ilr|naive: each round, the strong base model retrained on the refined labels
  local round
  for ((round = 1; round <= ROUNDS; round++)); do
    needs "$run/$1_$round/labels.jsonl"
    LATER=10 strong_models "$at/$1_$round" "$run/$1_$round" "$run/$1_$round/labels.jsonl"
  done
}

relabeled_models() {   # relabeled_models filter|rft|steer: the base model retrained on labels that another rule makes of ILR's comparisons
  local method=$1 round name dir how questions= labels=() comparisons=()
  for ((round = 1; round <= ROUNDS; round++)); do
    name=$at/${method}_$round dir=$run/${method}_$round
    needs "$run/ilr_$round/labels.jsonl"
    labels+=("$run/ilr_$round/labels.jsonl") comparisons+=("$run/ilr_$round/comparisons.jsonl")
    case $method in
      filter) how=(--labels "${labels[-1]}") ;;
      rft) how=(--labels "$start" --proposals "${labels[@]}") ;;
      steer) how=(--labels "$start" --comparisons "${comparisons[@]}") questions=$run/steer_1/questions.jsonl
        [ $round != 1 ] || stage "$name/ask" "$questions" "$PYTHON" refine.py --method steer --labels "$data/$EVAL.jsonl" --task "$TASK" --out "$questions" ;;
    esac
    stage "$name/refine" "$dir/labels.jsonl" "$PYTHON" refine.py --method $method "${how[@]}" --task "$TASK" --out "$dir/labels.jsonl"
    [ $method != filter ] || grade_labels "$name" "$dir"
    LATER=10 strong_models "$name" "$dir" "$dir/labels.jsonl"
  done
}

ensemble() {       # the half-models of ILR's first round vote on every test problem, with DPO_SAMPLES answers together, an even number
  local dir=$run/ensemble_1 halves=("$run/ilr_1/half_1" "$run/ilr_1/half_2") k LATER=10
  for k in 1 2; do       # a seed each: noise of their own
    needs "${halves[k - 1]}"
    stage "$at/ensemble_1/answer_$k" "$dir/samples_$k.jsonl" "${MODEL[@]}" generate.py --model "${halves[k - 1]}" --data "$data/$EVAL.jsonl" --num-samples $(((DPO_SAMPLES + 1) / 2)) \
      --temperature "$DPO_TEMPERATURE" --seed $((seed + 1000 * k)) --out "$dir/samples_$k.jsonl" $DECODING $LOADING
  done
  stage "$at/ensemble_1/vote" "$dir/eval_1.jsonl" "$PYTHON" refine.py --method vote --labels "$data/$EVAL.jsonl" \
    --proposals "$dir/samples_1.jsonl" "$dir/samples_2.jsonl" --task "$TASK" --out "$dir/eval_1.jsonl"
  grade "$at/ensemble_1/grade" "$dir/eval_1"
}

preferences() {    # preferences METHOD: what a round's policy is trained on, and by which stage it is sampled and judged
  local how samples=1 asked=$dir/comparisons.jsonl
  case $method in
    dpo) samples=$DPO_SAMPLES how=(pairs --comparisons "$asked") ;;
    dpo-release) samples=$DPO_SAMPLES how=(pairs --comparisons "$asked" --reading same) ;;
    dpo-coin) samples=$DPO_SAMPLES how=(pairs --comparisons "$asked" --reading coin) ;;
    dpo-labels) asked=$run/ilr_$round/comparisons.jsonl how=(pairs --comparisons "$asked") ;;
    sft-chosen) asked=$run/dpo_$round/comparisons.jsonl how=(chosen --comparisons "$asked") ;;
    spin) how=(spin --labels "$start" --proposals "$dir/samples.jsonl") ;;
  esac
  case $method in dpo|dpo-release|dpo-coin|spin)
    stage "$name/sample" "$dir/samples.jsonl" "${MODEL[@]}" generate.py --model "$policy" --data "$data/unlab.jsonl" --temperature "$DPO_TEMPERATURE" \
      --num-samples "$samples" --seed $((seed + 1000 * round)) --source policy --out "$dir/samples.jsonl" $DECODING $LOADING ;;
  esac
  case $method in
    dpo|dpo-release|dpo-coin)
      [ "$JUDGE" != trained ] || needs "$judge"
      stage "$name/compare" "$asked" "${ASKED[@]}" compare.py score --judge "$judge" --task "$TASK" \
        --a "$dir/samples.jsonl" --out "$asked" $SCORING "${ASKING[@]}" ;;
    dpo-labels|sft-chosen) needs "$asked" ;;
  esac
  stage "$name/pairs" "$dir/preferences.jsonl" "$PYTHON" refine.py --method "${how[@]}" --task "$TASK" --max-replace "$DPO_ALPHA" --seed "$seed" \
    --out "$dir/preferences.jsonl"
}

policies() {       # policies dpo|dpo-labels|spin|sft-chosen: each round trains the policy that the one before left, from SFT's on
  local method=$1 round policy=$run/sft/model_1 name dir r
  for ((round = 1; round <= ROUNDS; round++)); do
    name=$at/${method}_$round dir=$run/${method}_$round
    needs "$policy"
    preferences
    for ((r = 1; r <= RETRAINS; r++)); do
      if [ $method = sft-chosen ]; then
        train "$name/train" "$dir/model_$r" "$policy" "$dir/preferences.jsonl" "$CHOSEN_LR" "$SFT_EPOCHS" "$SFT_BATCH" --seed $((seed + 1000 * (r - 1)))
      else
        stage "$name/train" "$dir/model_$r" "${MODEL[@]}" dpo.py --model "$policy" --data "$dir/preferences.jsonl" --out "$dir/model_$r" \
          "${loss[@]}" --lr "$DPO_LR" --epochs "$DPO_EPOCHS" --batch-size "$DPO_BATCH" --seed $((seed + 1000 * (r - 1))) \
          --lora-rank "$LORA_RANK" $TRAINING $PREFERRING $ADAPTING
      fi
    done
    policy=$dir/model_1
  done
}

policy_answers() { # policy_answers METHOD: the test answers of its rounds
  local round models r
  for ((round = 1; round <= ROUNDS; round++)); do
    models=()
    for ((r = 1; r <= RETRAINS; r++)); do models+=("$run/$1_$round/model_$r"); done
    needs "${models[RETRAINS - 1]}"
    LATER=10 answer "$at/$1_$round" "$run/$1_$round" "${models[@]}"
  done
}

# ---------------------------------------------------------------- the run
pipeline() {
  local seed run data at judge loss steps method bases start
  base_recipe
  for seed in $SEEDS; do
    at=seed_$seed run=$OUT/seed_$seed data=$OUT/seed_$seed/data judge=$OUT/seed_$seed/judge/model
    [ "$JUDGE" = trained ] || judge=$JUDGE
    loss=(--beta "$BETA")
    case $DPO_LOSS in
      sigmoid) ;;
      cdpo|rdpo) loss+=(--loss "$DPO_LOSS" --judge "$judge") ;;
      asft) loss=(--loss asft) ;;
      *) loss+=(--loss "$DPO_LOSS") ;;
    esac
    [ "$DPO_NLL" = 0 ] || loss+=(--nll-weight "$DPO_NLL")
    start=$run/weak/labels.jsonl
    [ "$CLEAN_START" = 0 ] || start=$run/clean/labels.jsonl
    [ -z "$LABEL_NOISE" ] || start=$run/noise/labels.jsonl
    stage "$at/data" "$data/test.jsonl" "$PYTHON" "tasks/$TASK.py" --out "$data" --train "$TRAIN" --gt "$GT" --test "$TEST" \
      --seed "$seed" "${PREPARE[@]}"
    steps=(strong_base weak_side start_models)
    for method in $ALL_METHODS; do
      case " $METHODS " in *" $method "*) ;; *) continue ;; esac
      case $method in
        ilr|naive) steps+=("refined_labels $method" "refined_models $method") ;;
        filter|rft|steer) steps+=("relabeled_models $method") ;;
        ensemble) steps+=(ensemble) ;;
        *) steps+=("policies $method" "policy_answers $method") ;;
      esac
    done
    lanes "${steps[@]}" ceiling
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
rm -f "$OUT"/.stage.* "$OUT/.slots"
mkfifo "$OUT/.slots"
exec 8<>"$OUT/.slots"                        # JOBS digits: a stage holds one while it runs
rm "$OUT/.slots"
for ((k = 1; k <= JOBS; k++)); do printf $k >&8; done
TOTAL=$(DRY=1; pipeline | wc -l | tr -d ' ')
undisturbed=$([ -e "$OUT/times.jsonl" ] || echo yes)
pipeline
[ -z "$undisturbed" ] || echo "{\"stage\": \"whole run\", \"seconds\": $SECONDS}" >>"$OUT/times.jsonl"
# all is complete: what a stage that was killed between its last two steps left behind
find "$OUT" \( -name '.*.partial' -o -name '.*.writing' \) -prune -exec rm -rf {} +
"$PYTHON" evaluate.py report "$OUT"
echo "done in $((SECONDS / 60)) min $((SECONDS % 60)) s: $OUT/report.md"
