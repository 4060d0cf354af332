#!/usr/bin/env bash
# Predict runs of `small` on 2 CPU cores from a profile alone, profile and runs in turns: scripts/cpu_points.sh [FOLDER]
#
#   TURNS=2 …     how often
#   DRY_RUN=1 …   print the commands and start nothing
#
# Each turn measures a profile, then trains each strategy; the table at the end has every turn's runs beside the
# prediction from the profile of the same turn. Nothing else may run meanwhile. A turn takes about eight minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
folder=${1:-runs/cpu_points}
python=${PYTHON:-python}
train="model=small train.seq_len=512 train.micro_batch_size=2 train.global_batch_size=4 train.steps=11 train.eval_every=0
       train.eval_batches=1 metrics.profile_every=0 metrics.warmup_steps=3 metrics.tensorboard=false checkpoint.every=0
       runtime.device=cpu"

run() {
  echo "$*"
  if [[ -z ${DRY_RUN:-} ]]; then "$@" > /dev/null; fi
}

for turn in $(seq "${TURNS:-2}"); do
  start=("$python" -m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node=2)
  run "${start[@]}" scripts/matmul.py runtime.device=cpu profile="cpu_points_$turn"
  for strategy in dp fsdp pp tp; do
    # shellcheck disable=SC2086
    run "${start[@]}" train/main.py strategy=$strategy $train metrics.dir="$folder/$turn"
  done
done
for turn in $(seq "${TURNS:-2}"); do
  echo "turn $turn: $python -m launch.predict $folder/$turn/* hardware=measured/cpu_points_$turn,cpu_default"
  if [[ -z ${DRY_RUN:-} ]]; then
    "$python" -m launch.predict "$folder/$turn"/* hardware="measured/cpu_points_$turn,cpu_default"
    rm "configs/hardware/measured/cpu_points_$turn.yaml"
  fi
done
