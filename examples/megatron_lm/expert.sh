#!/usr/bin/env bash
# An owner's expert through Megatron-LM: the paper's settings (arXiv 2507.07024, section 4.1) on one node of 8 GPUs.
#   MEGATRON_LM=checkout ANCHOR=anchor/ EXPERT=notes VECTOR=notes.npz DATA=data/notes SAVE=runs/notes bash expert.sh [MORE ARGUMENTS]
set -euo pipefail
: "${MEGATRON_LM:?checkout of Megatron-LM core_v0.16.1}" "${ANCHOR:?published anchor}" "${EXPERT:?name of the expert}"
: "${VECTOR:?domain vector from flexolmo embed}" "${DATA:?prefix of .bin and .idx}" "${SAVE:?folder for checkpoints}"

export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_DEVICE_MAX_CONNECTIONS=1   # Megatron-LM asks for it with tensor parallelism

arguments=(
  # An ordinary launch: data, batch, schedule, precision, layout, checkpoints.
  --train-data-path "$DATA" --num-workers 2 --eval-iters 0 --eval-interval 1000
  --seq-length 4096 --micro-batch-size 1 --global-batch-size 1024 --train-iters 11921
  --lr 9e-4 --min-lr 0 --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0
  --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --clip-grad 1.0 --moe-z-loss-coeff 1e-3
  --bf16 --use-distributed-optimizer --overlap-grad-reduce --tensor-model-parallel-size 2 --sequence-parallel
  --log-interval 10 --save "$SAVE" --load "$SAVE" --save-interval 500
  # What makes it an expert of the anchor. The anchor brings the architecture.
  --flexolmo-anchor "$ANCHOR" --flexolmo-expert "$EXPERT" --flexolmo-domain-vector "$VECTOR"
)
exec ${LAUNCH:-torchrun --nproc-per-node 8 -m flexolmo_megatron.integrations.megatron_lm} "${arguments[@]}" "$@"
