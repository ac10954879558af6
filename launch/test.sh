#!/usr/bin/env bash
# The README's test command: environment, lint, types, docs, tests. pytest's own arguments may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment dev

lint() { echo "== ruff";  ruff check . && ruff format --check .; }
types() { echo "== mypy";  mypy; }
docs() { echo "== docs";  python -m docs.site; }
tests() {
  echo "== pytest"
  # A worker a core; a file's tests stay together, and files start in the order of `testpaths`, which has the longest first.
  python -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
}

if [ "$(nproc)" -ge 4 ]; then
  # Beside the tests; what they say is shown after them.
  said="$(mktemp)"
  trap 'rm -f "$said"' EXIT
  { lint && types && docs; } > "$said" 2>&1 &
  checks=$! failed=0
  tests "$@" || failed=$?
  wait "$checks" || failed=$?
  cat "$said"
  exit "$failed"
fi
lint
types
docs
tests "$@"
