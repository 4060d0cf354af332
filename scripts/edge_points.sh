#!/usr/bin/env bash
# What the tables of docs/edge.md are measured with: scripts/edge_points.sh [tiny|small ...], both if none is named
#
# Each model is trained for a few steps with strategy=tp_pp on 4 processes, exported to every target and measured, in
# turns. Speed does not depend on how long a model was trained. Most of the time is the compilers'. An export that is
# there already is not made again. The results are what the exports print, and the lines of build/edge/MODEL.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-.venv/bin/python}
models=("$@")
((${#models[@]})) || models=(tiny small)

trained() { # the run of model $1
  local folder=build/edge/$1
  if ! compgen -G "$folder/*/checkpoints/latest" > /dev/null; then
    $python -m launch.local nproc=4 strategy=tp_pp model="$1" model.vocab_size=256 train.seq_len=512 train.steps=20 \
      train.global_batch_size=2 train.eval_batches=2 checkpoint.every=20 metrics.dir="$folder" runtime.device=cpu \
      metrics.tensorboard=false metrics.profile_every=0 >&2
  fi
  compgen -G "$folder/*/checkpoints/latest" | head -1 | xargs dirname | xargs dirname
}

for model in "${models[@]}"; do
  run=$(trained "$model")
  for pair in onnx-none onnx-int8 gguf-F32 gguf-Q8_0 gguf-Q4_0 safetensors-none torch_export-none aoti-none \
    executorch-none executorch-8da4w; do
    if [[ ! -d $run/exports/$pair ]]; then
      $python scripts/export.py "$run" to="${pair%-*}" quant="${pair#*-}" || echo "exit code $?: $model $pair"
    fi
  done
  $python scripts/edge_bench.py "$run"/exports/* trust=true rounds=5 --json | tee "build/edge/$model.jsonl"
done
