#!/usr/bin/env bash
# What a machine with two GPUs can show of the parallelism, stage by stage: correctness first.
#
#     bash benchmarks/multi_gpu_session.sh [tests] [softmax] [experts] [steps] [busy] [sequence]
#     bash benchmarks/multi_gpu_session.sh long    # the hybrid to 1M tokens by cp 2, five minutes
#     bash benchmarks/multi_gpu_session.sh long_beside    # also what gpu_session.sh has on long texts,
#                                                         # on both GPUs side by side, a quarter hour
#
# Without names it runs all of the first line, about eleven minutes. Results go to the folder $OUT. Prepared data lie
# in data_cache/stdlib.
export OMP_NUM_THREADS=4
source benchmarks/session.sh
ranks() { echo "python3 -m torch.distributed.run --standalone --nproc-per-node $1"; }
pretrain="launch/pretrain.py recipe=text01_tiny run_root=$runs data.sources.stdlib.path=data_cache/stdlib trainer.max_steps=20 log.every_steps=1 evaluation.every_steps=null checkpoint.every_steps=null"

tests() {
    CUDA_VISIBLE_DEVICES=0 run blocks 110 "$pytest tests/kernels/test_attention_block.py" 12 &
    CUDA_VISIBLE_DEVICES=1 run parts 300 "$pytest tests/kernels/test_lightning_part.py tests/kernels/test_lightning_triton.py -k 'not addresses'" 12 &
    run ring 110 "$pytest tests/parallel/test_ring.py" 12 &
    # The same run on one GPU and on two, in fp32, by every exchange.
    run equal 110 "
        CUDA_VISIBLE_DEVICES=0 python3 $pretrain run_id=one &
        one=\$!
        $(ranks 2) $pretrain run_id=two parallel.cp=2 parallel.ep=2
        wait \$one
        $(ranks 2) $pretrain run_id=ring parallel.cp=2 parallel.etp=2 parallel.softmax_attention=ring parallel.lightning_attention=lasp parallel.zero_stage=3
        python3 benchmarks/compare_runs.py $runs/text01_tiny/one $runs/text01_tiny/two $runs/text01_tiny/ring" 8 &
    wait
}
sequence() { run sequence 80 "$(ranks 2) benchmarks/sequence_over_ranks.py 'kinds=[lightning]'" 14; }
softmax() { # two heads at a million tokens, where eight would take minutes
    run softmax 90 "$(ranks 2) benchmarks/sequence_over_ranks.py 'kinds=[softmax]' 'lengths=[32768,131072,524288]'" 14
    run softmax_1m 90 "$(ranks 2) benchmarks/sequence_over_ranks.py 'kinds=[softmax]' 'lengths=[1048576]' softmax_heads=2 seconds=0.1" 5
}
experts() {
    run experts_ep 60 "$(ranks 2) benchmarks/experts_over_ranks.py ep=2 model=text01_3b layers=8 'groups=[1,2]'" 4
    run experts_etp 60 "$(ranks 2) benchmarks/experts_over_ranks.py etp=2 'groups=[1,2]' model=text01_3b" 4
}
steps() {
    local step="benchmarks/train_step.py model=text01_1b rival=false steps=15 profile=true"
    local long="$step shape.softmax_every=0 document_tokens=16777216 micro_batch_tokens=32768"
    run one 40 "CUDA_VISIBLE_DEVICES=0 $(ranks 1) $step" 1
    run dp2 40 "$(ranks 2) $step" 1
    run cp2 40 "$(ranks 2) $step parallel.cp=2" 1
    run cp2_ring 40 "$(ranks 2) $step parallel.cp=2 parallel.softmax_attention=ring" 1
    run ep2 40 "$(ranks 2) $step parallel.ep=2" 1
    run ep2_two_groups 40 "$(ranks 2) $step parallel.ep=2 parallel.expert_token_groups=2" 1
    run ep2_capacity 40 "$(ranks 2) $step parallel.ep=2 moe.capacity_factor=2.0" 1
    run long_dp2 40 "$(ranks 2) $long" 1
    run long_cp2 40 "$(ranks 2) $long parallel.cp=2" 1
    run long_cp2_lasp 40 "$(ranks 2) $long parallel.cp=2 parallel.lightning_attention=lasp" 1
    run longer_dp2 40 "$(ranks 2) $long micro_batch_tokens=65536" 1
    run longer_cp2 40 "$(ranks 2) $long micro_batch_tokens=65536 parallel.cp=2" 1
}
busy() { # so many tokens that the GPUs never wait for the host
    local step="benchmarks/train_step.py model=text01_1b rival=false steps=10 profile=true micro_batch_tokens=65536"
    run busy_dp2 60 "$(ranks 2) $step" 1
    run busy_cp2 60 "$(ranks 2) $step parallel.cp=2" 1
    run busy_ep2 60 "$(ranks 2) $step parallel.ep=2" 1
    run busy_ep2_two_groups 60 "$(ranks 2) $step parallel.ep=2 parallel.expert_token_groups=2" 1
}
long() { run long_cp2 400 "python3 benchmarks/long_steps.py ranks=2 'kinds=[hybrid]' ${LENGTHS:+'lengths=[$LENGTHS]'} budget_s=390 output=$out/long_cp2" 12; }
on_gpu() { CUDA_VISIBLE_DEVICES=$1 LENGTHS=$2 OUT=$out/gpu$1 bash benchmarks/gpu_session.sh "${@:3}" || echo "gpu$1" >>"$out/FAILED"; }
long_beside() { # what takes one GPU first, as even as it gets
    on_gpu 0 1048576 long_control long_hybrid &
    on_gpu 1 8192,131072,524288 long_hybrid prefill needles &
    wait
    LENGTHS=1048576,524288,131072,8192 long
}

[ $# -gt 0 ] || set -- tests softmax experts steps busy sequence
for stage in "$@"; do "$stage"; done
[ ! -e "$out/FAILED" ]
