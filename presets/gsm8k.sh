# GSM8K with the paper's models: gemma-2b supervises Mistral-7B.
EVALS="test validation platinum"
TRAIN=${TRAIN:-7473}
GT=${GT:-3736}
TEST=${TEST:-1319}
DATA_DIR=${DATA_DIR:-data/gsm8k}
case ${EVAL:-} in
  validation) DATA_FLAGS="${DATA_FLAGS:-} --validation 500" ;;   # kept back from training
  platinum) DATA_FLAGS="${DATA_FLAGS:-} --platinum" ;;           # GSM8K-Platinum's test problems
esac
