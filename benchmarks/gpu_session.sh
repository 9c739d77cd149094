#!/usr/bin/env bash
# What a machine with one GPU can show, stage by stage: correctness first, then times.
#
#     bash benchmarks/gpu_session.sh [lightning] [tests] [large] [losses] [kernels] [rivals] [steps]
#     bash benchmarks/gpu_session.sh checkpointing policies long    # 8K to 1M tokens, nine minutes
#     bash benchmarks/gpu_session.sh long_control                   # its slowest half, eight minutes
#
# Without names it runs all of the first line, which takes about 25 minutes. Results go to the folder $OUT; the exit
# status tells whether every stage went well. Wheels in .whl and prepared data in data_cache/stdlib
# are optional.
source benchmarks/session.sh
large="addresses or 32_bits"

tests() { # side by side; what needs most of the memory is left to `large`
    run sanitize 240 "compute-sanitizer --tool memcheck --error-exitcode 1 python3 benchmarks/sanitize.py" 9 &
    for file in ${TESTS:-tests/kernels/test_*.py tests/trainer}; do
        grep -rq "gpu" "$file" || continue
        run "$(basename "$file" .py)" 200 "$pytest $file -k 'not ($large)'" 4 &
    done
    wait
}
large() { run large 200 "$pytest tests/kernels -k '$large'" 10; }
lightning() { run lightning 150 "python3 benchmarks/kernels.py 'ops=[lightning]' 'lengths=[${LENGTHS:-2048,8192,32768,131072,1048576}]' rivals=false seconds=0.2 steady_s=${STEADY:-1} output=$out/lightning" 40; }
losses() { run losses 200 "python3 benchmarks/kernel_losses.py output=$out/losses.json" 3; }
kernels() { run kernels 260 "python3 benchmarks/kernels.py 'lengths=[8192,32768]' rivals=false budget_s=${BUDGET:-230} output=$out/kernels" 120; }
rivals() { # the slow ones last: fla tunes itself for minutes
    run rivals 560 "python3 benchmarks/kernels.py 'lengths=[${LENGTHS:-8192}]' 'ops=[${OPS:-cross_entropy,norm,gated_norm,silu_qkv,swiglu,rope,permute,experts,lightning}]' seconds=0.15 budget_s=${BUDGET:-500} output=$out/rivals" 150
}
steps() {
    run step_1b 110 "python3 benchmarks/train_step.py model=text01_1b steps=50 output=$out/step_1b.jsonl"
    run step_1b_compiled 110 "python3 benchmarks/train_step.py model=text01_1b steps=20 compile=true rival=false output=$out/step_1b_compiled.jsonl"
    run step_1b_torch 80 "python3 benchmarks/train_step.py model=text01_1b steps=20 kernels=torch rival=false output=$out/step_1b_torch.jsonl"
    [ -d data_cache/stdlib ] && run pretrain_1b 100 "python3 launch/pretrain.py recipe=text01_1b run_root=/tmp/runs run_id=gpu data.sources.corpus.path=data_cache/stdlib data.global_batch_tokens=65536 trainer.max_steps=50 evaluation.every_steps=null checkpoint.every_steps=null; cp /tmp/runs/text01_1b/gpu/metrics.jsonl $out/" 8
}

checkpointing() { run checkpointing 150 "$pytest tests/parallel/test_checkpointing.py tests/kernels/test_attention.py -k 'checkpointing or (32_bits and cudnn)'" 12; }
policies() { run policies 200 "python3 benchmarks/long_steps.py every_way=true 'lengths=[32768]' 'kinds=[hybrid]' step.document_tokens=8192 budget_s=190 output=$out/policies" 14; }
long() { # hybrid to 1M tokens, the control while it is quick; then the control's long rows
    run long_hybrid 360 "python3 benchmarks/long_steps.py 'kinds=[hybrid]' budget_s=350 output=$out/long_hybrid" 16
    run long_short_control 120 "python3 benchmarks/long_steps.py 'kinds=[control]' 'lengths=[8192,131072]' budget_s=115 output=$out/long_short_control" 8
}
long_control() { run long_control 580 "python3 benchmarks/long_steps.py 'kinds=[control]' 'lengths=[524288,1048576]' budget_s=570 output=$out/long_control" 8; }

[ $# -gt 0 ] || set -- lightning tests large losses kernels rivals steps
for stage in "$@"; do "$stage"; done
[ ! -e "$out/FAILED" ]
