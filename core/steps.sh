# Sourced by run_ilr.sh: details of the weak side, and the steps of baselines.
# They use its variables: $seed, $run, $weak, ...

accept=ilr     # the rule of refine.py by which a proposal replaces its label
[ "$JUDGE" != oracle ] || accept=oracle
errs=          # what tells a simulated judge how often it errs
[ "$JUDGE" != simulated ] || errs="--judge-accuracy $JUDGE_ACCURACY"

wants() { case " $METHODS " in *" $1 "*) ;; *) return 1 ;; esac; }

base_models() { # $weak and $strong where no model is given; plans the pair if $BASES lacks it
  local base recipe bases='' missing=''
  if [ "$PRETRAIN" ]; then
    recipe=$({ sed -n '/^# -.* recipe /,/^# -.* the names /p' "tasks/$TASK.py"
               echo "$PRETRAIN $PRETRAIN_WEAK $PRETRAINING"; } | cksum)
    bases=$BASES/$TASK-${recipe%% *}/seed_$BASE_SEED    # another recipe is another folder
    for base in weak strong; do
      [ -z "${!base}" ] || continue
      printf -v $base %s "$bases/$base"
      [ -e "$bases/$base" ] || missing="$missing $base"
    done
  fi
  [ -z "$missing" ] || stage bases/corpora "tasks/$TASK.py" --pretrain "$PRETRAIN" \
    "$PRETRAIN_WEAK" --seed "$BASE_SEED" --out "$bases/corpora"
  for base in $missing; do     # trained in fp32, kept in 16 bits
    stage "bases/train_$base" sft.py --init-config "$bases/corpora/$base.json" \
      --tokenizer "$bases/corpora/tokenizer" --data "$bases/corpora/corpus_$base.jsonl" \
      --out "$bases/fp32/$base" --seed "$BASE_SEED" $PRETRAINING --state-every "$STATE_EVERY"
    stage "bases/$base" core/merge.py --model "$bases/fp32/$base" --out "$bases/$base" \
      --dtype bfloat16
  done
  if [ "$ONLY_BASES" ]; then
    [ "$bases" ] || die "--bases: $PRESET has none of its own"
    [ "$missing" ] || { echo "$bases: complete"; exit; }
    run_plan "$bases"
  fi
}

weak_sft() {   # weak_sft NAME OUT RECORDS: SFT of the weak base model, with its checkpoints
  stage "$1" sft.py --model "$weak" --data "$3" --out "$2" --seed "$seed" --lr "$WEAK_LR" \
    --epochs "$WEAK_EPOCHS" --batch-size "$WEAK_BATCH" --lora-rank "$LORA_RANK" \
    --save-at $(printf '0.%02d ' $CHECKPOINTS) $TRAINING
}

judge_samples() { # answers to D_gt of every weak checkpoint, or of a weak model per category
  local sources percent part folder file k i
  samples=() checkpoints=()
  [ "$JUDGE" = trained ] || [ "$WEAK_ACCURACY" != 0 ] || return 0
  for part in $JUDGE_PARTS; do
    weak_sft "judge/train_$part" "$run/judge/$part" "$data/gt_$part.jsonl"
  done
  for percent in $CHECKPOINTS 100; do
    for part in ${JUDGE_PARTS:-weak}; do
      case $part in
        weak) folder=$run/weak/model file=samples_$percent ;;
        *) folder=$run/judge/$part file=samples_${part}_$percent ;;
      esac
      [ "$percent" = 100 ] || folder=$folder/checkpoint-$percent
      checkpoints+=("$folder") samples+=("$run/judge/$file.jsonl")
    done
  done
  sources=(${JUDGE_PARTS:-checkpoint checkpoint})      # a stage each, which can run side by side
  for ((k = 0; k < ${#sources[@]}; k++)); do
    local models=() outs=()
    for ((i = k; i < ${#samples[@]}; i += ${#sources[@]})); do
      models+=("${checkpoints[i]}") outs+=("${samples[i]}")
    done
    stage "judge/sample_$k" generate.py --model "${models[@]}" --data "$data/gt.jsonl" \
      --out "${outs[@]}" --temperature 0.6 --seed "$seed" --source "${sources[k]}" $decoding
  done
}

first_labels() { # $start: what SFT trains on, the weak model's labels or what a setting makes of it
  start=$run/weak/labels.jsonl
  if [ "$LABEL_NOISE" ]; then
    start=$run/noise/labels.jsonl
    stage noise baselines/label_noise.py --labels "$run/weak/labels.jsonl" --task "$TASK" \
      --proposals "$data/unlab.jsonl" --share "$LABEL_NOISE" --kind "$FLIP_KIND" --seed "$seed" \
      --out "$start"
    grade_labels noise "$run/noise"
  elif [ "$CLEAN_START" = 1 ]; then
    start=$run/clean/labels.jsonl
    refine clean clean "$start" "$ALPHA" --labels "$run/weak/labels.jsonl"
    grade_labels clean "$run/clean"
  fi
}

# ---------------------------------------------------------------- methods of baselines/
run_baselines() { # core/settings.py printed a line for each: METHOD ROUNDS SAMPLES STEPS...
  local method rounds samples steps
  while read -r method rounds samples steps; do
    [ -z "$method" ] || baseline "$method" "$rounds" "$samples" $steps
  done <<<"$BASELINES"
}

make_by() {    # make_by METHOD FILE: FILE.jsonl of the round, by the method's own file
  stage "$name/$2" "baselines/$(echo "$1" | tr - _).py" --run "$run" --round "$round" \
    --start "$start" --task "$TASK" --alpha "$ALPHA" --dpo-alpha "$DPO_ALPHA" --seed "$seed" \
    --questions "$data/$EVAL.jsonl" --out "$dir/$2.jsonl"
}

baseline() {   # baseline METHOD ROUNDS SAMPLES STEPS...
  local method=$1 rounds=$2 samples=$3 policy=$run/sft/model_1 questions=$questions step k
  shift 3
  for ((round = 1; round <= rounds; round++)); do
    name=${method}_$round dir=$run/${method}_$round
    for step in "$@"; do
      case $step in
        labels) make_by "$method" labels ;;
        grade) grade_labels "$name" "$dir" ;;
        pairs) make_by "$method" preferences ;;
        questions)
          [ "$round" != 1 ] || make_by "$method" questions
          questions=$run/${method}_1/questions.jsonl ;;
        vote)
          make_by "$method" eval_1
          grade "$name/grade_1" "$dir/eval_1" ;;
        sample) sample "$samples" ;;
        judge) compare "$dir/samples.jsonl" ;;
        halves)
          for k in 1 2; do       # a seed each: noise of their own
            stage "$name/answer_$k" generate.py --model "$run/ilr_1/half_$k" \
              --data "$data/$EVAL.jsonl" --num-samples $(((DPO_SAMPLES + 1) / 2)) \
              --temperature "$DPO_TEMPERATURE" --seed $((seed + 1000 * k)) \
              --out "$dir/samples_$k.jsonl" $decoding $LOADING
          done ;;
        retrain) retrain "$name" "$dir" "$dir/labels.jsonl" ;;
        prefer) next_policy dpo ${told:+--judge "$told"} ;;
        prefer-unjudged) next_policy dpo ;;
        finetune) next_policy finetune "$policy" "$dir/labels.jsonl" "$CHOSEN_LR" ;;
        *) die "baselines/$method: its ROUND has '$step', which is no step of core/steps.sh" ;;
      esac
    done
  done
}
