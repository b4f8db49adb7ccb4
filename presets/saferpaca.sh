# SaferPaca: instructions and safety, graded by a language model behind an endpoint.
TRAIN=${TRAIN:-20000}
GT=${GT:-0}                       # of these D_gt, whose references train the weak side; 0: half
TEST=${TEST:-578}
DATA_DIR=${DATA_DIR:-data/saferpaca}
GRADE_LABELS=0
ILR_JUDGE_URL=${ILR_JUDGE_URL:-}          # the endpoint that grades test answers
ILR_JUDGE_MODEL=${ILR_JUDGE_MODEL:-}      # the model behind it
EMBEDDER=${EMBEDDER:-sentence-transformers/all-mpnet-base-v2}       # the paper's is an endpoint's
ILR_EMBEDDER_MODEL=${ILR_EMBEDDER_MODEL:-text-embedding-3-large}    # the model, where that is a URL
WEAK_EPOCHS=${WEAK_EPOCHS:-4}
SFT_EPOCHS=${SFT_EPOCHS:-4}
DPO_EPOCHS=${DPO_EPOCHS:-4}
JUDGE_PARTS=${JUDGE_PARTS:-general safety}
LABELING=${LABELING:---temperature 1.0}
PROPOSING=${PROPOSING:---temperature 1.0}
DPO_TEMPERATURE=${DPO_TEMPERATURE:-1.0}
DECODING=${DECODING:---max-new-tokens 512 --batch-size 256}
