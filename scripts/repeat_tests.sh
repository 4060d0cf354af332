#!/usr/bin/env bash
# Run `make test` several times in a row, to find what fails now and then: scripts/repeat_tests.sh [PASSES=10]
# Each pass is a log in build/passes/; started again after a break, it goes on with the pass that has no end yet.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p build/passes
for ((pass = 1; pass <= ${1:-10}; pass++)); do
  log=build/passes/$pass.log
  if [ ! -e "$log" ] || ! grep -qE '^(=+ )?[0-9]+ (passed|failed)' "$log"; then
    make test >"$log" 2>&1 || true
  fi
  echo "pass $pass: $(grep -E '^(=+ )?[0-9]+ (passed|failed).* in ' "$log" | tail -n 1); $(grep -m1 'bare step of tiny' "$log" || true)"
done
! grep -lE '^(FAILED|ERROR) |[0-9]+ failed' build/passes/*.log
