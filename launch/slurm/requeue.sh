# Sourced by the scripts beside it, from the project's root.
# run_and_requeue COMMAND…: runs a command, passes the scheduler's signals on to it, and puts the job back into the queue when the
# command leaves with 75: stopped by a signal, with all saved. Any other code is the job's own.

if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
fi

run_and_requeue() {
  local child code=0
  "$@" &
  child=$!
  # shellcheck disable=SC2064
  trap "kill -USR1 $child 2>/dev/null || true" USR1
  # shellcheck disable=SC2064
  trap "kill -TERM $child 2>/dev/null || true" TERM
  # A signal ends `wait`, not the command: wait again until it has left.
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  if [ "$code" -gt 128 ]; then # the signal may have come as it left: ask again for its own code
    code=0
    wait "$child" 2>/dev/null || code=$?
  fi
  if [ "$code" -eq 75 ]; then
    echo "saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  exit "$code"
}
