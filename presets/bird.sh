# BIRD, text to SQL. The databases: ILR_BIRD_DATABASES=folder, folder/<db>/<db>.sqlite.
TRAIN=${TRAIN:-9428}
GT=${GT:-4714}
TEST=${TEST:-1534}
DATA_DIR=${DATA_DIR:-data/bird}
STRONG_MODEL=${STRONG_MODEL-meta-llama/Meta-Llama-3-70B}
LOAD_IN_4BIT=${LOAD_IN_4BIT:-1}
