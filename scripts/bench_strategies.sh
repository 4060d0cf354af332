#!/usr/bin/env bash
# Measure every strategy on the GPUs of this machine, the most important first: scripts/bench_strategies.sh [override …]
#
#   DRY_RUN=1 …            print every command and check it by all rules, for 2, 4 and 8 GPUs; start nothing, need no GPU
#   NPROC=4 …              use this number of GPUs (default: all visible ones)
#   ONLY=REGEX …           run only the points whose label matches
#   RESULTS=FILE …         the file for results, one JSON object per line for each point (runs/bench.jsonl). Use another
#                          file for other overrides, because a point is identified by its label and number of GPUs
#   RETRY=1 …              run failed points again; without it, points that are in RESULTS are not run again
#   LIMIT_S=60 …           the longest time for a point, including its start and compilation
#
# It first runs the proof on `tiny`, then the points of scripts/benching/points.py, which explains how batches are chosen.
# The given overrides are added to every point. Points use bf16, 20 steps, and compilation unless the label says eager.
# A stopped point keeps its finished steps. NCCL's settings (NCCL_NVLS_ENABLE and the like) are not changed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python}
results=${RESULTS:-runs/bench.jsonl}
only=${ONLY:-.}
limit=${LIMIT_S:-60}
verify_limit=${VERIFY_LIMIT_S:-300}
more=("$@")

points() { "$python" scripts/benching/points.py "$@" ${more[@]+"${more[@]}"}; }

# The lines of the proof for $1 GPUs: label, then overrides. There is one world for the lab's own strategies, one for
# mixtures, and one for DeepSpeed, which may not be installed.
proofs() {
  local own=dp,zero1,zero2,fsdp,tp,pp,cp moe=ep
  if ((${1} >= 4)); then own+=,hsdp,fsdp_tp,fsdp_cp,cp_tp,tp_pp,fsdp_pp,dp_pp; fi
  if ((${1} >= 8)); then own+=,3d moe+=,moe_3d; fi
  local sizes="precision=float32 model.num_heads=8 model.num_kv_heads=8 train.micro_batch_size=2 train.global_batch_size=$((4 * $1))"
  printf 'verify\tstrategy=%s %s\n' "$own" "$sizes"
  # in float32 rounding decides which experts get a token
  printf 'verify, mixtures\tstrategy=%s model=moe_tiny %s\n' "$moe" "${sizes/float32/float64}"
  printf 'verify, DeepSpeed\tstrategy=ds_zero1,ds_zero2,ds_zero3,ds_pp,ds_autotp %s\n' "$sizes"
}

dry_run() {
  local status=0 n label words nproc
  for n in ${NPROC:-2 4 8}; do
    while IFS=$'\t' read -r label words; do
      echo "python scripts/verify.py nproc=$n $words  # $label"
    done < <(proofs "$n")
    while IFS=$'\t' read -r label nproc words; do
      echo "torchrun --standalone --nproc_per_node=$nproc train/main.py $words  # $label"
    done < <(points list "$n")
    points check "$n" || status=$?
  done
  return "$status"
}

# Whether the point with label $1 on $2 processes is in the results; with RETRY=1, whether it is there as ok.
done_already() {
  [[ -f $results ]] && grep -F "\"label\": \"$1\", \"nproc\": $2, " "$results" | grep -q "\"status\": \"${RETRY:+ok}"
}

# Run "$@" for at most $limit seconds, with its output in $log. Sets $status and $took, the seconds that it took.
limited() {
  local code=0 start=$SECONDS
  # torchrun gets some time to end its ranks, so that no GPU stays in use
  timeout --foreground --kill-after=45 "$limit" "$@" >"$log" 2>&1 </dev/null || code=$?
  took=$((SECONDS - start))
  case $code in 0) status=ok ;; 124 | 137) status="stopped after $limit s" ;; *) status="failed ($code)" ;; esac
}

run_all() {
  local n=$1 label words nproc log status took
  mkdir -p "$(dirname "$results")"
  folder=$(mktemp -d)  # not local: the trap outlives this function
  trap 'rm -rf "$folder"' EXIT
  log=$folder/log
  while IFS=$'\t' read -r label words; do
    if ! [[ $label =~ $only ]] || done_already "$label" "$n"; then continue; fi
    # shellcheck disable=SC2086  # words are overrides without spaces
    limit=$verify_limit limited "$python" scripts/verify.py "nproc=$n" $words
    cat "$log"
    "$python" scripts/benching/results.py row "$results" "$label" "$n" "$status" "$took" "$folder" $words
  done < <(proofs "$n")
  while IFS=$'\t' read -r label nproc words; do
    if ! [[ $label =~ $only ]] || done_already "$label" "$nproc"; then continue; fi
    rm -rf "$folder/runs"
    # shellcheck disable=SC2086
    limited "$python" -m torch.distributed.run --standalone "--nproc_per_node=$nproc" train/main.py $words \
      "metrics.dir=$folder/runs" metrics.tensorboard=false
    "$python" scripts/benching/results.py row "$results" "$label" "$nproc" "$status" "$took" "$folder" $words
  done < <(points list "$n")
  "$python" scripts/benching/results.py table "$results"
}

if [[ -n ${DRY_RUN:-} ]]; then
  dry_run
else
  gpus=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
  if ((gpus < 2)); then
    echo "this machine has $gpus GPU(s), but strategies need 2: use DRY_RUN=1 to see the commands" >&2
    exit 3
  fi
  points check "$gpus" || echo "these points will fail, and the results will say so"
  run_all "$gpus"
fi
