#!/usr/bin/env bash
# A new dense anchor through Megatron-LM, 7 B parameters, on one node of 8 GPUs.
#   MEGATRON_LM=checkout DATA=data/public TOKENIZER=name SAVE=runs/anchor bash anchor.sh [MORE ARGUMENTS]
set -euo pipefail
: "${MEGATRON_LM:?checkout of Megatron-LM core_v0.16.1}" "${DATA:?prefix of .bin and .idx}"
: "${TOKENIZER:?Hugging Face tokenizer that the data was made with}" "${SAVE:?folder for checkpoints}"

export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=1   # Megatron-LM asks for it with tensor parallelism

arguments=(
  --num-layers 32 --hidden-size 4096 --ffn-hidden-size 11008 --num-attention-heads 32 --num-query-groups 32
  --max-position-embeddings 4096 --padded-vocab-size 100352
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
  --train-data-path "$DATA" --num-workers 2 --eval-iters 0 --eval-interval 1000
  --seq-length 4096 --micro-batch-size 1 --global-batch-size 1024 --train-iters 100000
  --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1
  --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --clip-grad 1.0
  --bf16 --use-distributed-optimizer --overlap-grad-reduce --tensor-model-parallel-size 2 --sequence-parallel
  --log-interval 10 --save "$SAVE" --load "$SAVE" --save-interval 500
)
exec ${LAUNCH:-torchrun --nproc-per-node 8 -m flexolmo_megatron.integrations.megatron_lm} "${arguments[@]}" "$@"
