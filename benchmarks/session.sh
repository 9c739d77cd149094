# What the sessions on lent machines share; sourced from the repository's root.
#
# Results go to $out, all output to $out/session.log; that of a stage that has not ended is in a log
# of its own beside it. $out/FAILED names the stages that failed. $runs is for the folders of runs.
# Wheels that the machine lacks lie in .whl.
set -uo pipefail
out=${OUT:-gpu_results}
mkdir -p "$out" /tmp/rooms/fulmen
rm -f "$out/FAILED"
if [ -z "${WHEELS_ARE_IN:-}" ] && ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
fi
export WHEELS_ARE_IN=1 # for sessions within this one
for room in launch recipes trainer parallel models data kernels; do
    ln -sfn "$PWD/$room" "/tmp/rooms/fulmen/$room"
done
# The last folder is cutlass's, whose .pth file counts in a real site folder only.
export PYTHONPATH=/tmp/rooms:/tmp/site:/tmp/site/nvidia_cutlass_dsl/python_packages
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FULMEN_TEST_GPU=1
pytest="python3 -m pytest -m gpu -q -p no:cacheprovider"

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
# Without CUDA many a stage would skip its work, or do it on the CPU, and end well.
if ! python3 -c "
import torch
assert torch.cuda.is_available(), 'torch sees no GPU'
for index in range(torch.cuda.device_count()):
    assert torch.ones(8, device=f'cuda:{index}').sum().item() == 8
"; then
    echo "== CUDA does not work here" | tee "$out/FAILED"
    exit 1
fi
# A run of an earlier session on the same machine would be gone on with.
runs=$(mktemp -d /tmp/runs_XXXXXX)
trap 'rm -rf "$runs"' EXIT

run() { # name, seconds, command, lines to show
    local log=$out/$1.log mark=FULMEN_STAGE=$1.$$ status
    env "$mark" timeout -k 15 "$2" bash -e -o pipefail -c "$3" >"$log" 2>&1
    status=$?
    end_marked "$mark"
    { echo "== $1: exit $status"; cat "$log"; } >>"$out/session.log"
    echo "== $1: exit $status"
    [ $status -eq 0 ] || echo "$1: exit $status" >>"$out/FAILED"
    grep -v -i -e warn -e '^ *$' -e OMP_NUM "$log" | tail -n "${4:-6}" | cut -c1-420
    rm "$log" # few files come back
}
# What a stage left behind, by its environment: jobs in the background, and torchrun's ranks, which
# are in groups of their own, outlive what timeout ends, and would share the GPU with the next stage.
end_marked() {
    local second
    for second in {1..20}; do
        [ -n "$(marked "$1")" ] || return 0
        [ "$second" -le 5 ] || marked "$1" | xargs -r kill -KILL 2>/dev/null
        sleep 1
    done
}
marked() { grep -lszxF "$1" /proc/[0-9]*/environ | cut -d/ -f3; }
