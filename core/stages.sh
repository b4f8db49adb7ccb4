# Sourced by run_ilr.sh: reads the settings, checks them, and defines `stage` and `run_plan`.
# It runs on bash 3.2 with BSD tools, which is what macOS has.
cd "$here"

die() { echo "run_ilr.sh: error: $*" >&2; exit 2; }

# ---------------------------------------------------------------- the command line
ACTION=run PRESET= CARD= ONLY_BASES=
for word in ${1+"$@"}; do
  case $word in
    --dry-run) [ $ACTION = estimate ] || ACTION=dry-run ;;
    --bases) ONLY_BASES=1 ;;
    --estimate) ACTION=estimate CARD=H100 ;;
    --estimate=*) ACTION=estimate CARD=${word#*=} ;;
    --help|-h) ACTION=help ;;
    -*) die "unknown option $word; try --help" ;;
    *=*) die "$word: variables go first: $word bash run_ilr.sh" ;;
    *) [ -z "$PRESET" ] || die "two tasks, $PRESET and $word: one run is of one"
       PRESET=$word ;;
  esac
done

# ---------------------------------------------------------------- the settings
set -a       # exported: core/settings.py and the stages see them
PYTHONUTF8=1 PYTHONIOENCODING=utf-8:backslashreplace    # whatever the locale says
unset PYTHONOPTIMIZE                    # 2 removes the docstrings, which transformers reads
command -v python >/dev/null || PYTHON=${PYTHON:-python3}
PYTHON=${PYTHON:-python}
case $PYTHON in
  /*) ;;
  */*) PYTHON=$caller/$PYTHON ;;       # paths are relative to this folder, but for the interpreter
esac
command -v "$PYTHON" >/dev/null || die "PYTHON is '$PYTHON': expected a Python interpreter"
if [ -n "${FROM:-}" ]; then            # what that run was made with is this one's default
  inherited=$("$PYTHON" -m core.settings inherit "$FROM") || exit $?
  while IFS='=' read -r name value; do
    [ "${!name+given}" ] || export "$name=$value"
  done <<<"$inherited"
  unset name value inherited
fi
PRESET=${PRESET:-${TASK:-arithmetic}}
TASK=$PRESET
case $PRESET in
  */*) die "unknown task $PRESET" ;;
  generic) die "presets/generic.sh is for every task: name one" ;;
esac
if [ -e "presets/$PRESET.sh" ]; then . "presets/$PRESET.sh"; fi
[ -e "tasks/$TASK.py" ] || die "unknown task $PRESET: there is neither presets/$PRESET.sh nor" \
  "tasks/$TASK.py"
. presets/generic.sh
plain() { printf '%s' "$1" | sed -e 's|/\./|/|g' -e 's|//*|/|g' -e 's|^\./||' -e 's|\(.\)/$|\1|'; }
OUT=$(plain "$OUT") FROM=$(plain "$FROM") BASES=$(plain "$BASES")
case $OUT in .) OUT=$here ;; -*) OUT=$here/$OUT ;; esac       # a path is not taken for a flag
case $BASES in -*) BASES=$here/$BASES ;; esac
set +a
if [ $ACTION = help ]; then
  sed -n '2,/^set /s/^# \{0,1\}//p' run_ilr.sh
  "$PYTHON" -m core.settings help "$PRESET"
  exit
fi
BASELINES=$("$PYTHON" -m core.settings check "$PRESET") || exit $?

# ---------------------------------------------------------------- settings that are flags
# lower case, where a setting of that name exists: config.json has the settings as they were given
TRAINING="$PACKING --state-every $STATE_EVERY"
ADAPTERS="--lora-rank $LORA_RANK" LOADING=
decoding=$DECODING scoring=$SCORING dpo_flags=$DPO_FLAGS
[ "$LOAD_IN_4BIT" = 0 ] || LOADING=--load-in-4bit
if [ "$NPROC" = 1 ]; then
  ADAPTERS="$ADAPTERS $LOADING"
else       # several processes train sharded 16 bits; 8-bit optimizers cannot read shards
  dpo_flags=${DPO_FLAGS/8bit/}
fi
if [ "$DTYPE" ]; then
  TRAINING="$TRAINING --dtype $DTYPE" decoding="$decoding --dtype $DTYPE"
  scoring="$scoring --dtype $DTYPE"
fi
if [ "$CHAT_TEMPLATE" = 1 ]; then
  TRAINING="$TRAINING --chat-template" decoding="$decoding --chat-template"
  scoring="$scoring --chat-template"
fi

# ---------------------------------------------------------------- the plan
plan='' at=''
stage() {      # stage NAME SCRIPT ARGUMENTS...: put a command on the plan, under $at/NAME
  local word
  plan+=${at:+$at/}$1
  shift
  for word in "$@"; do plan+=$'\x1f'$word; done
  plan+=$'\n'
}
run_plan() {   # run_plan [FOLDER]: run what is on the plan, by default in $OUT
  OUT=${1:-$OUT}
  exec "$PYTHON" -m core.stages "$ACTION" "$CARD" <<<"$plan"
}
