#!/usr/bin/env bash
# What a machine with one GPU can show, stage by stage: correctness first, then times.
#
#     bash benchmarks/gpu_session.sh [lightning] [tests] [large] [losses] [kernels] [rivals] [steps]
#     bash benchmarks/gpu_session.sh long_tests policies       # rows of many tokens: six minutes
#     bash benchmarks/gpu_session.sh long_hybrid prefill       # 8K to 1M and to 4M: nine minutes
#     bash benchmarks/gpu_session.sh long_control              # softmax in every layer: nine minutes
#     bash benchmarks/gpu_session.sh needles                   # what small models retrieve: five
#     bash benchmarks/gpu_session.sh pictures vision           # vl01_1b on pictures: six minutes
#     bash benchmarks/gpu_session.sh operations                # resuming and saving: two
#
# Without names it runs all of the first line, which takes about 25 minutes. Results go to the
# folder $OUT; the exit status tells whether every stage went well. Wheels in .whl and prepared data
# in data_cache/stdlib are optional.
source benchmarks/session.sh
large="addresses or 32_bits"

tests() { # side by side; what needs most of the memory is left to `large`
    tune &
    run sanitize 300 "compute-sanitizer --tool memcheck --error-exitcode 1 python3 benchmarks/sanitize.py" 9 &
    for file in ${TESTS:-tests/kernels/test_*.py tests/trainer}; do
        grep -rq "gpu" "$file" || continue
        run "$(basename "$file" .py)" 300 "$pytest $file -k 'not ($large)'" 4 &
    done
    wait
}
tune() { # fla compiles some two hundred variants, minutes of work; they are kept for `rivals`
    FLA_CACHE_RESULTS=0 run tune_fla 235 "python3 benchmarks/kernels.py 'ops=[lightning]' 'lengths=[32768]' 'providers=[fla]' documents=0 seconds=0.05 output=/tmp/tune" 2
}
large() { run large 200 "$pytest tests/kernels -k '$large'" 10; }
lightning() { run lightning 150 "python3 benchmarks/kernels.py 'ops=[lightning]' 'lengths=[${LENGTHS:-2048,8192,32768,131072,1048576}]' rivals=false seconds=0.2 steady_s=${STEADY:-1} output=$out/lightning" 40; }
losses() { run losses 200 "python3 benchmarks/kernel_losses.py output=$out/losses.json" 3; }
kernels() { run kernels 260 "python3 benchmarks/kernels.py 'lengths=[8192,32768]' rivals=false budget_s=${BUDGET:-230} output=$out/kernels" 120; }
rivals() { # at the shapes of the goals
    # fla on a packed row alone compiles for a minute, where the host is slow.
    run rivals_lightning 110 "python3 benchmarks/kernels.py 'lengths=[32768]' 'ops=[lightning]' 'providers=[fulmen triton,fla]' documents=0 seconds=0.15 budget_s=90 output=$out/rivals_lightning" 40
    run lightning_packed 60 "python3 benchmarks/kernels.py 'lengths=[32768]' 'ops=[lightning]' rivals=false seconds=0.15 budget_s=50 output=$out/lightning_packed" 40
    run lightning_1m 110 "python3 benchmarks/kernels.py 'lengths=[32768,1048576]' 'ops=[lightning]' rivals=false documents=0 seconds=0.15 budget_s=90 output=$out/lightning_1m" 40
    run rivals_products 110 "python3 benchmarks/kernels.py 'lengths=[8192]' 'ops=[cross_entropy,experts]' seconds=0.15 budget_s=90 output=$out/rivals_products" 60
    run rivals_memory 170 "python3 benchmarks/kernels.py 'lengths=[32768]' 'ops=[norm,gated_norm,silu_qkv,swiglu,rope,permute]' seconds=0.1 budget_s=150 output=$out/rivals_memory" 90
}
steps() {
    run step_1b 110 "python3 benchmarks/train_step.py model=text01_1b steps=50 output=$out/step_1b.jsonl"
    run step_1b_compiled 110 "python3 benchmarks/train_step.py model=text01_1b steps=20 compile=true rival=false output=$out/step_1b_compiled.jsonl"
    run step_1b_torch 80 "python3 benchmarks/train_step.py model=text01_1b steps=20 kernels=torch rival=false output=$out/step_1b_torch.jsonl"
    [ -d data_cache/stdlib ] && run pretrain_1b 170 "
        trap 'cp $runs/text01_1b/gpu/metrics.jsonl $out/' EXIT
        python3 launch/pretrain.py recipe=text01_1b run_root=$runs run_id=gpu data.sources.corpus.path=data_cache/stdlib data.global_batch_tokens=65536 trainer.max_steps=50 evaluation.every_steps=null checkpoint.every_steps=null" 8 # it ends by writing 12 GB
}

long_tests() {
    run long_tests 200 "$pytest tests/parallel/test_checkpointing.py tests/kernels/test_attention_merge.py tests/trainer/test_prefill_gpu.py" 12
    run cudnn_groups 100 "$pytest tests/kernels/test_attention.py -k '32_bits and cudnn'" 8
    run attention_errors 60 "python3 benchmarks/attention_errors.py" 12
}
policies() { run policies 200 "python3 benchmarks/long_steps.py every_way=true 'lengths=[32768]' 'kinds=[hybrid]' step.document_tokens=8192 budget_s=190 output=$out/policies" 14; }
long_hybrid() { run long_hybrid 330 "python3 benchmarks/long_steps.py 'kinds=[hybrid]' ${LENGTHS:+'lengths=[$LENGTHS]'} warmup_tokens=1048576 budget_s=320 output=$out/long_hybrid" 16; }
prefill() { run prefill 230 "python3 benchmarks/prefill.py total_seconds=220 'lengths=[32768,131072,1048576,4194304]' output=$out/prefill" 8; }
needles() {
    for model in hybrid lightning; do
        run "needles_$model" 300 "python3 benchmarks/niah_training.py model=$model seconds=150 evaluation_seconds=90 workers=5 output=$out/needles_$model" 20 &
    done
    wait
}
long_control() { run long_control 560 "python3 benchmarks/long_steps.py 'kinds=[control]' budget_s=550 output=$out/long_control" 16; }

pictures() { # of 300 to 1,400 pixels, for `vision`; work of the CPU alone
    local vl=/tmp/vl prepare="python3 launch/prepare_images.py num_workers=${WORKERS:-16} validation_fraction=0.01"
    run pictures 200 "
        python3 launch/make_images.py output=$vl/made captions=0 conversations=${PICTURES:-3000} texts=300 pairs=0 held_out=20 width=[300,1400] height=[300,1400]
        $prepare input=$vl/made/conversations output=$vl/instructions vocab_size=600
        $prepare input=$vl/made/texts output=$vl/texts tokenizer=$vl/instructions" 4
}
vision() { # stage II of vl01_1b on pictures: its speed, and whether the GPU waits for them
    local vl=/tmp/vl
    run vision_tests 120 "$pytest tests/models/test_vision_gpu.py tests/models/test_coca_gpu.py tests/trainer/test_gpu.py" 8
    run preflight 60 "python3 launch/preflight.py" 12
    [ -d $vl/texts ] || pictures
    run vl01_1b 260 "
        trap 'cp $runs/vl01_1b/gpu/metrics.jsonl $out/vl01_1b.jsonl' EXIT
        python3 launch/pretrain.py recipe=vl01_1b run_root=$runs run_id=gpu '~stages.alignment' '~stages.experience' '~stages.preference' '~data.sources.descriptions' '~data.sources.experience' '~data.sources.image_pairs' '~data.sources.text_pairs' data.sources.instructions.path=$vl/instructions data.sources.texts.path=$vl/texts model.vision.image_token_id=1 trainer.max_steps=${STEPS:-25} log.every_steps=1 evaluation.every_steps=null evaluation.reading.every_steps=null checkpoint.every_steps=null ${VL_KEYS:-}
        python3 benchmarks/run_speed.py $runs/vl01_1b/gpu" 12
}
operations() { # of text01_1b: needs data_cache/stdlib, and 25 GB below /tmp; its one write takes half a minute
    TMPDIR=$runs run operations 235 "python3 benchmarks/operations.py recipe=text01_1b save_every=${SAVE_EVERY:-8} write_first=false resumes=1 preflight=false data.sources.corpus.path=data_cache/stdlib data.global_batch_tokens=16384 output=$out/operations.json" 24
}

[ $# -gt 0 ] || set -- lightning tests large losses kernels rivals steps
for stage in "$@"; do "$stage"; done
[ ! -e "$out/FAILED" ]
