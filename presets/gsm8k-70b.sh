# GSM8K with larger models: Mistral-7B supervises Llama-3-70B, in 4 bits on one GPU.
TASK=gsm8k
WEAK_MODEL=${WEAK_MODEL-mistralai/Mistral-7B-v0.1}
STRONG_MODEL=${STRONG_MODEL-meta-llama/Meta-Llama-3-70B}
LOAD_IN_4BIT=${LOAD_IN_4BIT:-1}
[ "${LORA_RANK:-64}" = 0 ] || WEAK_LR=${WEAK_LR:-1e-4}
. presets/gsm8k.sh
