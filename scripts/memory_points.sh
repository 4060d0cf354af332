#!/usr/bin/env bash
# Run points on one GPU whose peaks of memory are compared with the closed form: scripts/memory_points.sh [FOLDER]
#
#   HARDWARE=h200_sxm …   the device, whose memory decides the boundaries
#   DRY_RUN=1 …           print the commands and start nothing
#
# Some points run beside each other, as the peak is one of the allocator of each process. The boundaries follow one by
# one, each with the largest micro batch that should fit and the next: the second runs out of memory, which is expected.
# Then: python -m scripts.scoring.check_memory FOLDER/* hardware=h100_sxm
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
folder=${1:-runs/memory}
at_once=${AT_ONCE:-3}
hardware=${HARDWARE:-h100_sxm}
common="model=llama_1b data=synthetic precision=bf16 train.seq_len=4096 train.steps=3 train.eval_every=0 train.eval_batches=1
        metrics.profile_every=0 metrics.warmup_steps=0 metrics.tensorboard=false checkpoint.every=0 metrics.dir=$folder"

# A run with $1 sequences a microbatch and $2 microbatches, and more overrides.
run() {
  local command
  command="${PYTHON:-python} -m torch.distributed.run --standalone --nproc_per_node=1 train/main.py"
  command+=" $(echo $common) train.micro_batch_size=$1 train.global_batch_size=$(($1 * $2)) ${*:3}"
  echo "$command"
  if [[ -z ${DRY_RUN:-} ]]; then $command > /dev/null 2>&1 || echo "exit code $?: ${*:3} micro batch $1"; fi
}

together() {
  while (($(jobs -rp | wc -l) >= at_once)); do sleep 0.2; done
  run "$@" model.num_layers=4 &
}

full=train.activation_checkpointing=full
selective=train.activation_checkpointing=selective
compiled=compile.enabled=true
together 1 2 strategy=single
together 4 2 strategy=single
together 4 2 strategy=single $full
together 4 2 strategy=single $selective
together 4 2 strategy=single $compiled
together 4 2 strategy=single $compiled $full
together 2 2 strategy=single precision=float32 model.num_kv_heads=16
together 4 2 strategy=single model.tie_embeddings=true model.dropout=0.1
together 4 2 strategy=dp
together 4 2 strategy=fsdp
together 4 2 strategy=fsdp $selective
together 4 2 strategy=fsdp $compiled
together 4 2 strategy=tp
together 4 2 strategy=tp $full
together 4 2 strategy=tp $compiled
together 2 4 strategy=pp
together 2 4 strategy=pp $full
wait

boundary() {
  local most
  most=$("${PYTHON:-python}" -m scripts.scoring.largest_batch hardware="$hardware" model=llama_1b precision=bf16 "$@")
  run "$most" 1 "$@"
  run $((most + 1)) 1 "$@"
}

boundary strategy=single model.num_layers=8 train.seq_len=8192
boundary strategy=fsdp train.seq_len=8192
boundary strategy=single model.num_layers=8 train.seq_len=8192 precision=float32 model.num_kv_heads=16
boundary strategy=single model.num_layers=8 train.seq_len=16384 $compiled
