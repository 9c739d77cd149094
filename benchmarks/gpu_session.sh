#!/usr/bin/env bash
# Everything that a machine with one GPU can show, in one call: correctness first, then times.
# Results go to the folder $OUT. Wheels that the machine lacks lie in .whl, prepared data in
# data_cache/stdlib; both are optional.
set -uo pipefail
out=${OUT:-gpu_results}
mkdir -p "$out" /tmp/rooms/fulmen
if ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
fi
for room in launch recipes trainer parallel models data kernels; do
    ln -sfn "$PWD/$room" "/tmp/rooms/fulmen/$room"
done
# The second folder of /tmp/site is cutlass's, whose .pth file counts in a real site folder only.
export PYTHONPATH=/tmp/rooms:/tmp/site:/tmp/site/nvidia_cutlass_dsl/python_packages PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FULMEN_TEST_GPU=1
run() { # name, seconds, command
    echo "== $1"
    timeout "$2" bash -c "$3" >"$out/$1.log" 2>&1
    echo "exit $?"
    grep -v -i warn "$out/$1.log" | tail -n "${4:-6}" | cut -c1-400
}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
run tests_trainer 90 "python3 -m pytest -m gpu tests/trainer tests/kernels/test_moe.py -q -p no:cacheprovider" 15
run step_1b 70 "python3 benchmarks/train_step.py model=text01_1b steps=50 output=$out/step_1b.jsonl" 5
[ -d data_cache/stdlib ] && run pretrain_1b 100 "python3 launch/pretrain.py recipe=text01_1b run_root=/tmp/runs run_id=gpu data.sources.corpus.path=data_cache/stdlib data.global_batch_tokens=65536 trainer.max_steps=50 evaluation.every_steps=25 checkpoint.every_steps=null; cp /tmp/runs/text01_1b/gpu/metrics.jsonl /tmp/runs/text01_1b/gpu/report.html $out/" 8
run kernels 260 "python3 benchmarks/kernels.py 'lengths=[8192,32768]' rivals=false budget_s=230 output=$out/kernels" 120
run step_1b_reference 70 "python3 benchmarks/train_step.py model=text01_1b steps=20 lightning=reference rival=false output=$out/step_1b_reference.jsonl" 5
run tests_triton 120 "python3 -m pytest -m gpu tests/kernels/test_lightning_triton.py -q -x -p no:cacheprovider -k 'not million'" 15
exit 0
