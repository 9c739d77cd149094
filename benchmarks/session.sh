# What the sessions on lent machines share; sourced from the repository's root.
#
# Results go to $out, all output to $out/session.log. Wheels that the machine lacks lie in .whl.
set -uo pipefail
out=${OUT:-gpu_results}
mkdir -p "$out" /tmp/rooms/fulmen
rm -f "$out/FAILED"
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
fi
for room in launch recipes trainer parallel models data kernels; do
    ln -sfn "$PWD/$room" "/tmp/rooms/fulmen/$room"
done
# The last folder is cutlass's, whose .pth file counts in a real site folder only.
export PYTHONPATH=/tmp/rooms:/tmp/site:/tmp/site/nvidia_cutlass_dsl/python_packages
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FULMEN_TEST_GPU=1
pytest="python3 -m pytest -m gpu -q -p no:cacheprovider"

run() { # name, seconds, command, lines to show
    local log=/tmp/session_$1.log
    timeout "$2" bash -c "$3" >"$log" 2>&1
    local status=$?
    { echo "== $1: exit $status"; cat "$log"; } >>"$out/session.log"
    echo "== $1: exit $status"
    [ $status -eq 0 ] || touch "$out/FAILED"
    grep -v -i -e warn -e '^ *$' -e OMP_NUM "$log" | tail -n "${4:-6}" | cut -c1-420
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
