#!/usr/bin/env bash
# Make a table of docs/netlab.md: scripts/bench_netlab.sh links|speeds|placement|presets|hosts [override …]
#
#   DRY_RUN=1 …     print every command, and start nothing
#   FOLDER=… …      the folder of the runs (runs/bench_netlab)
#
# Each needs an idle machine with a core for each process. It continues after an interruption; fresh=true starts again.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
table=${1:-}
more=("${@:2}")
dry=()
if [[ -n ${DRY_RUN:-} ]]; then dry=(dry_run=true); fi

netlab() {
  "${PYTHON:-python}" -m launch.netlab "$@" "metrics.dir=${FOLDER:-runs/bench_netlab}" ${dry[@]+"${dry[@]}"} ${more[@]+"${more[@]}"}
}

# 12 steps, of which step 10 is recorded; a microbatch of 8 sequences on each of two hosts, two in a pipeline
steps=(train.steps=12 train.eval_every=0 train.eval_batches=1 train.global_batch_size=16 train.micro_batch_size=8)

case $table in
  links) netlab nodes=4 nproc=4 inter=100mbit,1gbit links=true ;;
  speeds) netlab nodes=2 nproc=2 inter=25mbit,100mbit,250mbit,1gbit strategy=dp,fsdp,tp,pp "${steps[@]}" ;;
  placement) netlab nodes=2 nproc=4 inter=100mbit intra=1gbit strategy=tp_pp order=tp.pp,pp.tp "${steps[@]}" ;;
  # on two cores desktops_1gbe takes about two hours, as it says before the first run
  presets) for name in h100_ib400 a100_eth100 desktops_1gbe; do
      netlab nodes=2 nproc=2 "preset=$name" strategy=dp,fsdp,tp,pp "${steps[@]}"
    done ;;
  hosts) netlab nodes=16 nproc=16 strategy=dp,fsdp "${steps[@]}" train.global_batch_size=16 train.micro_batch_size=1 ;;
  *)
    echo "scripts/bench_netlab.sh ${table:-(nothing)}: use links, speeds, placement, presets or hosts" >&2
    exit 2
    ;;
esac
