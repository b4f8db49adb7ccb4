# The settings of every run, each with its meaning; the values are those of the paper (GPU).
# A variable of the environment comes first, then presets/NAME.sh, then this file.

# The run
OUT=${OUT:-runs/$PRESET}          # the run folder
FROM=${FROM:-}                    # a run folder whose stages are taken over where nothing differs
SEEDS=${SEEDS:-0}                 # data seeds, one after the other
METHODS=${METHODS:-ilr dpo}       # ilr, dpo, naive, and any file of baselines/ (rft, filter)
ROUNDS=${ROUNDS:-3}               # rounds of every method
RETRAINS=${RETRAINS:-1}           # trainings per reported point, with different data orders
EVALS=${EVALS:-test}              # the files that the task writes to be tested on
EVAL=${EVAL:-test}                # which of them to test on; validation while choosing settings

# Data
TRAIN=${TRAIN:-5000}              # training problems, D_gt and D_unlab together
GT=${GT:-2500}                    # of these D_gt, whose references train the weak side
TEST=${TEST:-500}                 # test problems
DATA_DIR=${DATA_DIR:-}            # folder of the task's own train.jsonl and test.jsonl
DATA_FLAGS=${DATA_FLAGS:-}        # further flags of tasks/TASK.py
GRADE_LABELS=${GRADE_LABELS:-1}   # 0: grading costs money, so only test answers are graded

# Models
WEAK_MODEL=${WEAK_MODEL-google/gemma-2b}                   # the unreliable side: hub name or folder
STRONG_MODEL=${STRONG_MODEL-mistralai/Mistral-7B-v0.1}     # the model to train: hub name or folder
LORA_RANK=${LORA_RANK:-64}        # rank of SFT's and DPO's adapters; 0 trains every weight
LOAD_IN_4BIT=${LOAD_IN_4BIT:-0}   # 1: the strong model in 4 bits
DTYPE=${DTYPE:-}                  # float32 or bfloat16 to compute in; empty: bfloat16 on CUDA
CHAT_TEMPLATE=${CHAT_TEMPLATE:-0} # 1: both are chat models and get their own prompt format
ILR_DATE=${ILR_DATE:-}            # the day that chat templates write; empty: the run's first

# Weak SFT, on D_gt
case $LORA_RANK in
  0) WEAK_RATE=2e-5 SFT_RATE=1e-5 ;;      # every weight: untried
  *) WEAK_RATE=5e-4 SFT_RATE=1e-4 ;;      # the paper's
esac
WEAK_LR=${WEAK_LR:-$WEAK_RATE}    # peak learning rate of weak SFT
WEAK_EPOCHS=${WEAK_EPOCHS:-2}     # passes over D_gt
WEAK_BATCH=${WEAK_BATCH:-32}      # records a step
CHECKPOINTS=${CHECKPOINTS:-10 20 30 40 50 60 70 80 90}     # percent of weak SFT: the judge's data
WEAK_ACCURACY=${WEAK_ACCURACY:-0} # demonstrate with the checkpoint nearest to this; 0: the last
LABEL_NOISE=${LABEL_NOISE:-}      # demonstrations are references, this share wrong; empty: weak's
CLEAN_START=${CLEAN_START:-0}     # 1: SFT and ILR start from the unreliable labels that are right
LABELING=${LABELING:-}            # flags of generate.py where the weak model demonstrates

# Strong SFT, on the labels
SFT_LR=${SFT_LR:-$SFT_RATE}       # peak learning rate of strong SFT
SFT_EPOCHS=${SFT_EPOCHS:-2}       # passes over the labels
SFT_BATCH=${SFT_BATCH:-32}        # records a step
CHOSEN_LR=${CHOSEN_LR:-$SFT_LR}   # peak learning rate of SFT that goes on from SFT's model
PROPOSING=${PROPOSING---num-beams 4}      # flags of generate.py where half-models propose

# The judge
JUDGE=${JUDGE:-trained}           # trained, oracle, simulated, human, or the URL of an endpoint
JUDGE_MODEL=${JUDGE_MODEL:-}      # the model behind that URL
JUDGE_LR=${JUDGE_LR:-1e-6}        # peak learning rate of the judge
JUDGE_EPOCHS=${JUDGE_EPOCHS:-5}   # at most so many passes over its pairs
JUDGE_BATCH=${JUDGE_BATCH:-16}    # examples a step; a pair is two
JUDGE_OPTIMIZER=${JUDGE_OPTIMIZER:-auto}  # auto: 8-bit AdamW on CUDA
JUDGE_WRONG=${JUDGE_WRONG:-1}     # training pairs with an incorrect sample, per problem
JUDGE_ACCURACY=${JUDGE_ACCURACY:-0}       # its training stops at this; simulated: it is this
JUDGE_PARTS=${JUDGE_PARTS:-}      # categories, each with a weak model; empty: the weak checkpoints
JUDGE_FLIPS=${JUDGE_FLIPS:-0}     # share of the judge's answers that are turned round
FLIP_KIND=${FLIP_KIND:-symmetric} # symmetric: by chance; systematic: like problems err alike
SECONDS_PER_PAIR=${SECONDS_PER_PAIR:-60}  # what a person has for each answer
EMBEDDER=${EMBEDDER:-}            # what compares answers where the task has no rule: model or URL
ALPHA=${ALPHA:-0.15}              # share of the disagreements that ILR may replace

# DPO
DPO_ALPHA=${DPO_ALPHA:-0.15}      # share of all pairs that DPO trains on, the judge's surest
DPO_SAMPLES=${DPO_SAMPLES:-6}     # answers per problem, compared two by two
DPO_TEMPERATURE=${DPO_TEMPERATURE:-0.7}   # of these answers
DPO_LR=${DPO_LR:-1e-6}            # peak learning rate of DPO
DPO_EPOCHS=${DPO_EPOCHS:-2}       # passes over the pairs
DPO_BATCH=${DPO_BATCH:-32}        # pairs a step
DPO_LOSS=${DPO_LOSS:-sigmoid}     # one of LOSSES in dpo.py
BETA=${BETA:-}                    # pull towards the reference; empty: the loss's own, 0.1 for DPO
DPO_NLL=${DPO_NLL:-0}             # weight of the chosen answers' likelihood in DPO's loss
DPO_FLAGS=${DPO_FLAGS---optimizer rmsprop8bit}    # further flags of dpo.py

# The machine
PACKING=${PACKING:---micro-tokens 4096 --gradient-checkpointing}    # of trainers
JUDGE_PACKING=${JUDGE_PACKING:-}          # of the judge's training, after PACKING
DECODING=${DECODING:---max-new-tokens 256 --batch-size 256}         # of generate.py
SCORING=${SCORING:---micro-tokens 16384}  # of compare.py score
STATE_EVERY=${STATE_EVERY:-900}   # seconds between a training's resumable states
if command -v nvidia-smi >/dev/null; then LANES=1; else LANES=4; fi
JOBS=${JOBS:-$LANES}              # model stages side by side: 1 on one GPU, 4 on a CPU
THREADS=${THREADS:-1}             # CPU threads of each stage
NPROC=${NPROC:-1}                 # processes of each model stage, one a GPU, started by torchrun
LAUNCH=${LAUNCH:-}                # the words that start them instead (srun torchrun ...)
PYTHON=${PYTHON:-python}          # the interpreter

# Base models that are trained here, from random weights, if BASES has none of this recipe
BASES=${BASES:-bases}             # where they are kept; bases/README.md
BASE_SEED=${BASE_SEED:-0}         # another seed is another pair of base models
PRETRAIN=${PRETRAIN:-}            # solved problems that the strong one reads; empty: none is made
PRETRAIN_WEAK=${PRETRAIN_WEAK:-}  # solved problems that the weak one reads
PRETRAINING=${PRETRAINING:-}      # flags of sft.py for both
