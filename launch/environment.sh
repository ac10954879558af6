# Sourced by the scripts beside it: an environment with the project in it, made once and reused.
# An active virtual environment is used as it is; otherwise .venv in the project's root.
# environment EXTRAS: the extras to install, such as "val".

environment() {
  local extras="$1" root stamp wanted
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x "$root/.venv/bin/python" ]; then
      # The first that runs: a version manager's stand-in may be on the path without its Python.
      local python found=""
      for python in python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
          found="$python"
          break
        fi
      done
      if [ -z "$found" ]; then
        echo "Python 3.11 or newer is needed; python3 is $(python3 --version 2>&1 || true)." >&2
        exit 2
      fi
      python="$found"
      echo "making .venv with $("$python" --version)"
      "$python" -m venv "$root/.venv"
    fi
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
  fi
  # Installed again only when what is to be installed has changed; an environment with extras serves without them too.
  wanted="$(sha256sum "$root/pyproject.toml" | cut -c1-16)"
  stamp="$VIRTUAL_ENV/.ssl_pipeline_installed"
  if ! grep -qsx "$wanted ${extras:-.*}" "$stamp"; then
    echo "installing the project (torch is large: minutes on a fresh machine)"
    python -m pip install --quiet --editable "$root${extras:+[$extras]}"
    echo "$wanted ${extras:-plain}" >> "$stamp"
  fi
}
