#!/usr/bin/env bash
# Known vulnerabilities of all that is installed with the project, extras included; needs PyPI. pip-audit's own arguments may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment dev

installed="$(mktemp)"
trap 'rm -f "$installed"' EXIT
# Our own package is on no index; a build for one kind of device (+cpu, +cu130) is known by its plain version.
python -m pip freeze --exclude-editable | sed 's/+[A-Za-z0-9.]*$//' > "$installed"
# Strict: behind a mirror that has no advisories every package would be passed over, and the answer would be "none found".
python -m pip_audit --strict --no-deps --disable-pip --progress-spinner off --requirement "$installed" "$@"
