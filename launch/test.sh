#!/usr/bin/env bash
# The README's test command: environment, lint, types, docs, tests. pytest's own arguments may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment dev

echo "== ruff";  ruff check . && ruff format --check .
echo "== mypy";  mypy
echo "== docs";  python -m docs.site
echo "== pytest"
python -m pytest -q "$@"
