#!/usr/bin/env bash
# Every strategy on this machine's GPUs, the most telling first: scripts/bench_strategies.sh [override …]
#
#   DRY_RUN=1 …            print every line and check it by every rule, for 2, 4 and 8 GPUs; starts nothing, needs no GPU
#   NPROC=4 …              so many GPUs (those that are visible)
#   ONLY=REGEX …           only the points whose label matches
#   RESULTS=FILE …         where results go, a JSON object a line as each point ends (runs/bench.jsonl); other
#                          overrides need another file, as a point is known by its label and its number of GPUs
#   RETRY=1 …              run again what did not end well; what stands in RESULTS is otherwise not run again
#   LIMIT_S=60 …           the longest that a point may take, its start and compilation included
#
# First the proof on `tiny`, then the points of scripts/bench_points.py, which says how batches are chosen. Further
# overrides go to every point. bf16, compiled but where a label says eager, 20 steps. A stopped point keeps the steps
# that it made. NCCL's settings (NCCL_NVLS_ENABLE and the like) are left as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python}
results=${RESULTS:-runs/bench.jsonl}
only=${ONLY:-.}
limit=${LIMIT_S:-60}
verify_limit=${VERIFY_LIMIT_S:-300}
more=("$@")

points() { "$python" scripts/bench_points.py "$@" ${more[@]+"${more[@]}"}; }

# The proof's lines for $1 GPUs: label, then overrides. One world for the lab's own strategies, one for mixtures, and one
# for DeepSpeed's, which may be missing.
proofs() {
  local own=dp,zero1,zero2,fsdp,tp,pp,cp moe=ep
  if ((${1} >= 4)); then own+=,hsdp,fsdp_tp,fsdp_cp,cp_tp,tp_pp,fsdp_pp,dp_pp; fi
  if ((${1} >= 8)); then own+=,3d moe+=,moe_3d; fi
  local sizes="model.num_heads=8 model.num_kv_heads=8 train.micro_batch_size=2 train.global_batch_size=$((4 * $1))"
  printf 'verify\tstrategy=%s %s\n' "$own" "$sizes"
  printf 'verify, mixtures\tstrategy=%s model=moe_tiny %s\n' "$moe" "$sizes"
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

# Whether $2 ("label": "…", "nproc": N) stands in the results; with RETRY=1, whether it stands there as ok.
done_already() {
  [[ -f $results ]] && grep -F "\"label\": \"$1\", \"nproc\": $2, " "$results" | grep -q "\"status\": \"${RETRY:+ok}"
}

# Run "$@" for at most $limit seconds into $log; how it ended is in $status, how long it took in $took.
limited() {
  local code=0 start=$SECONDS
  # torchrun gets a while to end its ranks, so that no GPU is left in use
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
    "$python" scripts/bench_results.py row "$results" "$label" "$n" "$status" "$took" "$folder" $words
  done < <(proofs "$n")
  while IFS=$'\t' read -r label nproc words; do
    if ! [[ $label =~ $only ]] || done_already "$label" "$nproc"; then continue; fi
    rm -rf "$folder/runs"
    # shellcheck disable=SC2086
    limited "$python" -m torch.distributed.run --standalone "--nproc_per_node=$nproc" train/main.py $words \
      "metrics.dir=$folder/runs" metrics.tensorboard=false
    "$python" scripts/bench_results.py row "$results" "$label" "$nproc" "$status" "$took" "$folder" $words
  done < <(points list "$n")
  "$python" scripts/bench_results.py table "$results"
}

if [[ -n ${DRY_RUN:-} ]]; then
  dry_run
else
  gpus=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
  if ((gpus < 2)); then
    echo "this machine has $gpus GPU(s), and strategies need 2: use DRY_RUN=1 to see the lines" >&2
    exit 3
  fi
  points check "$gpus" || echo "these points will fail, and say so in the results"
  run_all "$gpus"
fi
