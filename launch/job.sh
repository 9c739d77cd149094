
# ---- What follows is the same for every run: launch/job.sh ----
set -u
# A task of an array has an id of its own, but for one of them that is the whole array's too.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
say() { echo "$(date '+%F %T') job $JOB: $*"; }

RESTARTS=${SLURM_RESTART_COUNT:-0}
export HERE CODE PYTHON NODES PROCESSES
set +u # the cluster's lines may read what is not set
. "$HERE/environment.sh"
set -u

if [ -e "$RUN/DONE" ]; then say "$RUN is done"; exit 0; fi
if [ -e "$RUN/STOP" ] && ! grep -qs "^job" "$RUN/STOP"; then
  say "somebody made $RUN/STOP, so nothing is trained: submit again to go on"; exit 0
fi
rm -f "$RUN/STOP" # of a job that was ended before it could take it away

# SLURM sends USR1 before the time limit (--signal). The trainer sees the file, finishes its step, saves and ends.
asked=0
on_usr1() { say "USR1: the run saves and stops"; asked=1; echo "job $JOB: time limit" >"$RUN/STOP"; }
trap on_usr1 USR1
# scancel and preemption send TERM to the trainer too, which saves by itself. Who goes on is not for this script to say:
# SLURM requeues what it preempted, and what was cancelled stays so.
terminated=0
on_term() { say "TERM: the run saves and stops"; terminated=1; }
trap on_term TERM

# Run a line of shell on every node, one task each. It is in the background so that traps run at once. When one of them
# ends, the others have so many seconds to end too.
on_nodes() {
  local seconds=$1 line=$2; shift 2
  srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --wait="$seconds" --kill-on-bad-exit=0 \
    bash -c '. "$HERE/environment.sh"; exec '"$line" _ "$@" &
  local pid=$! status
  while :; do
    wait "$pid"; status=$?
    kill -0 "$pid" 2>/dev/null || return "$status" # else a trap interrupted it
  done
}

# After a stop for the time limit: this job again, or the next one of the chain.
go_on() {
  rm -f "$RUN/STOP"
  if [ "$CHAIN" -gt 1 ]; then say "the next job of the chain goes on, if there is one"; exit 0; fi
  if [ "$RESTARTS" -ge "$REQUEUES" ]; then
    say "requeued $RESTARTS times, slurm.requeues=$REQUEUES: submit again to go on"; exit 0
  fi
  say "requeued"
  trap - TERM
  scontrol requeue "$JOB"
  sleep 300 # SLURM ends this script; its own end would count as the job's
  exit 1
}

# The same script as a new job without the bad nodes: a running job's list cannot be changed.
leave_out() {
  local bad count again
  bad=$(paste -sd, "$SEEN/bad_nodes"); count=$(wc -l <"$SEEN/bad_nodes")
  say "BAD NODES: $bad (docs/operations.md; $SEEN/preflight.json says why)"
  export FULMEN_REPLACED=$((${FULMEN_REPLACED:-0} + 1)) FULMEN_EXCLUDED="${FULMEN_EXCLUDED:+$FULMEN_EXCLUDED,}$bad"
  if [ "$LEAVE_OUT" = 0 ] || [ "$count" -ge "$NODES" ] || [ "$FULMEN_REPLACED" -gt "$REQUEUES" ]; then exit 3; fi
  local task=""
  if [ "$JOB" != "$SLURM_JOB_ID" ]; then # of a sweep, whose jobs are not kept apart by their name
    if squeue -h -r --user="$(id -u)" -n "$SLURM_JOB_NAME" -o "%F %K" | grep -v "^$SLURM_ARRAY_JOB_ID " | grep -q " $SLURM_ARRAY_TASK_ID\$"; then
      say "the next job of this run goes on"; exit 3
    fi
    task="--array=$SLURM_ARRAY_TASK_ID --dependency=afterany:$JOB"
  fi
  again=$(sbatch --parsable --export=ALL $task --exclude="${EXCLUDE:+$EXCLUDE,}$FULMEN_EXCLUDED" "$HERE/job.sh") || exit 3
  say "job $again takes over without them"
  exit 3
}

if [ -n "$INTERFACE" ]; then
  address=$(ip -4 -o addr show dev "$INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')
else
  address=$(scontrol -o show node "$SLURMD_NODENAME" | grep -oP ' NodeAddr=\K\S+')
fi
if [ -z "$address" ]; then say "$SLURMD_NODENAME has no address${INTERFACE:+ on $INTERFACE}"; exit 1; fi
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)

attempt=0 failures=0
while :; do
  attempt=$((attempt + 1))
  # A port of its own for each start: the last one may not be free yet.
  port=$((20000 + (SLURM_JOB_ID * 40 + (RESTARTS * 7 + attempt) * 2) % 20000))
  export ADDRESS=$address PORT=$((port + 1))
  say "start $attempt, restart $RESTARTS, on $names; rank 0 at $address:$PORT"

  if [ "$PREFLIGHT" = 1 ]; then
    rm -f "$SEEN/bad_nodes" "$SEEN/preflight.json"
    on_nodes "$PREFLIGHT_WAIT" '"$PYTHON" "$CODE/launch/preflight.py" "$@"' "nodes=[$names]" "address=$address" "port=$port" \
      "folder=$RUN" "output=$SEEN" "processes=$PROCESSES" "${PREFLIGHT_ARGUMENTS[@]}"
    status=$?
    if [ -s "$SEEN/bad_nodes" ]; then leave_out; fi
  else
    status=0
  fi

  if [ "$status" = 0 ] && [ "$asked$terminated" = 00 ]; then
    saved=$(readlink "$RUN/checkpoints/latest")
    on_nodes 60 '"$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
      --node-rank "$SLURM_NODEID" --master-addr "$ADDRESS" --master-port "$PORT" "$CODE/launch/pretrain.py" "$@"' \
      "${ARGUMENTS[@]}"
    status=$?
    if [ "$(readlink "$RUN/checkpoints/latest")" != "$saved" ]; then failures=0; fi
  fi

  if [ -e "$RUN/DONE" ]; then say "$RUN is done"; exit 0; fi
  if [ "$terminated" = 1 ]; then say "ended by TERM: submit again to go on"; exit 143; fi
  if [ "$asked" = 1 ]; then go_on; fi
  if [ -e "$RUN/STOP" ]; then say "stopped by $RUN/STOP: submit again to go on"; exit 0; fi
  if [ "$status" = 0 ]; then say "the run ended before its end: its train.log says why"; exit 0; fi
  failures=$((failures + 1))
  if [ "$failures" -gt "$RETRIES" ]; then
    say "FAILED $failures times with nothing saved in between (slurm.retries=$RETRIES), status $status"; exit 1
  fi
  say "failed with status $status; another start from the newest checkpoint ($failures of $RETRIES)"
done
