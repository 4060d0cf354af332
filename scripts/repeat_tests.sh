#!/usr/bin/env bash
# Run `make test` several times, to find tests that fail sometimes: scripts/repeat_tests.sh [PASSES=10]
# Each pass writes a log to build/passes/COMMIT/. After an interruption it continues with the first unfinished pass.
# The exit code is 1 if any pass failed or did not finish.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=build/passes/$(git describe --always --abbrev=10 --dirty=+ --exclude='*')
mkdir -p "$logs"
good=0
for ((pass = 1; pass <= ${1:-10}; pass++)); do
  log=$logs/$pass.log
  if [ ! -e "$log" ] || ! grep -qE '^(=+ )?[0-9]+ (passed|failed)' "$log"; then
    make test >"$log" 2>&1 || true
  fi
  echo "pass $pass: $(grep -E '^(=+ )?[0-9]+ (passed|failed).* in ' "$log" | tail -n 1); $(grep -m1 'bare step of tiny' "$log" || true)"
  if grep -qE '[0-9]+ passed' "$log" && ! grep -qE '^(FAILED|ERROR) |[0-9]+ (failed|error)' "$log"; then good=$((good + 1)); fi
done
echo "$good of ${1:-10} passes without a failure"
[ "$good" -eq "${1:-10}" ]
