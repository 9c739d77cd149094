#!/usr/bin/env bash
# Temporary: sixteen small models, one core each; see vl_tiny_sweep.py. Needs .whl of hydra-core, omegaconf, datasets, ...
source benchmarks/session.sh
export OMP_NUM_THREADS=1
T=${T:-455}; N=${N:-10000}; part=${T0:-45}
data() { # name tile patch width height letters resolution
    python3 launch/make_images.py output=/tmp/d/$1/made captions=$N conversations=$N texts=$N pairs=1 held_out=300 width=$4 height=$5 letters=$6 >/dev/null
    prepare="python3 launch/prepare_images.py tile_size=$2 patch_size=$3 max_tiles_per_side=3 max_tiles=6 resolution=$7 num_workers=1 validation_fraction=0"
    $prepare input=/tmp/d/$1/made/conversations "held_out='/tmp/d/$1/made/conversations/held_out*'" output=/tmp/d/$1/conversations vocab_size=314 >/dev/null
    for kind in captions texts; do
        $prepare input=/tmp/d/$1/made/$kind "held_out='/tmp/d/$1/made/$kind/held_out*'" output=/tmp/d/$1/$kind tokenizer=/tmp/d/$1/conversations >/dev/null &
    done; wait
}
data a16 32 16 [48,96] [32,32] [2,4] dynamic & data a8 32 8 [48,96] [32,32] [2,4] dynamic &
data e16 32 16 [48,96] [32,32] [1,3] dynamic & data f12 48 12 [48,96] [32,48] [2,4] fixed &
data c12 48 12 [48,96] [32,48] [2,4] dynamic & data s8 32 8 [32,64] [16,32] [1,3] dynamic &
wait
ls /tmp/d; echo "data made in $SECONDS s"
go() { timeout 500 python3 benchmarks/vl_tiny_sweep.py T=$T name="$@" >/tmp/sweep_$1.log 2>&1 & }
A=/tmp/d
go base pos=0 patchstd=0
go pos
go pos_lr3 lr=3e-3
go pos_vlr3 vlr=3.0
go pos_inv invert=0.5
go p8 data=$A/a8 patch=8 patchstd=0.06
go p8_inv data=$A/a8 patch=8 patchstd=0.06 invert=0.5
go easy data=$A/e16 invert=0.5
go fixed data=$A/f12 tile=48 patch=12 patchstd=0.05 invert=0.5
go t48 data=$A/c12 tile=48 patch=12 patchstd=0.05 invert=0.5
go softmax every=1 invert=0.5
go copy t0=$part text=0.3 invert=0.5
go copy_align t0=$part t1=120 text=0.2 invert=0.5
go fixed_copy data=$A/f12 tile=48 patch=12 patchstd=0.05 invert=0.5 t0=$part text=0.3
go small data=$A/s8 patch=8 patchstd=0.06 invert=0.5 t0=$part text=0.2
go mb1 mb=1024 h=64 e=4 eh=96 invert=0.5
wait
for f in /tmp/sweep_*.log; do tail -n 22 $f; done >$out/sweep.txt
grep END $out/sweep.txt; grep -c . $out/sweep.txt; grep -h -A4 Traceback /tmp/sweep_*.log | head -40
