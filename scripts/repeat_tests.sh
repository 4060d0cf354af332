#!/usr/bin/env bash
# Run `make test` several times, to find tests that fail sometimes: scripts/repeat_tests.sh [PASSES=10] [FILE...]
# With files, a pass runs all of their tests, also those marked slow. Each pass writes a log to build/passes/COMMIT/.
# After an interruption it continues with the first unfinished pass. With files, WORKERS=16 DIST=load uses a larger machine.
# The exit code is 1 if any pass failed or did not finish.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
passes=${1:-10} files=("${@:2}")
logs=build/passes/$(git describe --always --abbrev=10 --dirty=+ --exclude='*')
tests=(make test)
if [ ${#files[@]} -gt 0 ]; then
  logs+=/$(printf '%s\n' "${files[@]}" | sha256sum | cut -c 1-10)
  tests=(.venv/bin/python -m pytest --clock --numprocesses="${WORKERS:-2}" --dist="${DIST:-loadfile}" "${files[@]}")
fi
mkdir -p "$logs"
good=0
for ((pass = 1; pass <= passes; pass++)); do
  log=$logs/$pass.log
  if [ ! -e "$log" ] || ! grep -qE '^(=+ )?[0-9]+ (passed|failed)' "$log"; then
    "${tests[@]}" >"$log" 2>&1 || true
  fi
  echo "pass $pass: $(grep -E '^(=+ )?[0-9]+ (passed|failed).* in ' "$log" | tail -n 1); $(grep -m1 'bare step of tiny' "$log" || true)"
  if grep -qE '[0-9]+ passed' "$log" && ! grep -qE '^(FAILED|ERROR) |[0-9]+ (failed|error)' "$log"; then good=$((good + 1)); fi
done
echo "$good of $passes passes without a failure"
[ "$good" -eq "$passes" ]
