#!/usr/bin/env bash
# Temporary: sixteen small chains, one core each; see vl_tiny_sweep.py. Needs .whl of hydra-core, omegaconf, datasets, ...
source benchmarks/session.sh
export OMP_NUM_THREADS=1
S=${S:-1.0}; N=${N:-20000}; D=${D:-/tmp/d}; L=${L:-/tmp}; last=${LAST:-315}
data() { # name tile patch width height letters
    d=$D/$1; mk="python3 launch/make_images.py pairs=0 held_out=300 width=$4 height=$5 letters=$6"
    $mk output=$d/one captions=$N conversations=0 texts=$((N / 4)) >/dev/null & one=$!
    $mk output=$d/two captions=0 conversations=$N texts=0 >/dev/null
    prep="python3 launch/prepare_images.py tile_size=$2 patch_size=$3 max_tiles_per_side=3 max_tiles=6 num_workers=2 validation_fraction=0"
    kind() { $prep input=$d/$1 "held_out='$d/$1/held_out*'" output=$d/$2 resolution=$3 $4 >/dev/null; }
    kind two/conversations conversations dynamic vocab_size=314
    kind two/conversations aligned fixed tokenizer=$d/conversations &
    wait $one
    kind one/texts texts dynamic tokenizer=$d/conversations &
    kind one/captions captions fixed "tokenizer=$d/conversations max_caption_tokens=24"
    wait
}
data a 48 12 [44,52] [22,26] [2,4] & data e 32 8 [30,34] [16,17] [2,4] &
data f 48 12 [44,52] [22,26] [1,4] & data h 48 16 [44,52] [22,26] [2,4] &
wait
ls $D/*; echo "data made in $SECONDS s"
left=$((last - SECONDS))
go() { timeout $left python3 benchmarks/vl_tiny_sweep.py name="$@" >$L/sweep_$1.log 2>&1 & }
s() { python3 -c "print($1*$S)"; }
T="t=$(s 225) tj=0"
C="t=$(s 110) tt=$(s 20) ta=$(s 20) tj=$(s 75)"
go t_base data=$D/a $T
go t_con0 data=$D/a $T con=0
go t_lr4 data=$D/a $T clr=4e-3
go t_wide data=$D/a $T vh=128 clr=1e-3
go t_mb512 data=$D/a $T cmb=512
go t_p8 data=$D/e tile=32 patch=8 $T
go t_p16 data=$D/h patch=16 $T
go t_easy data=$D/f $T
go t_pos data=$D/a $T cpos=0.3 con=0.3
go c_base data=$D/a $C
go c_soft data=$D/a $C every=1
go c_lr data=$D/a $C lr=5e-3 vlr=0.2
go c_p8 data=$D/e tile=32 patch=8 $C
go c_align data=$D/a t=$(s 110) tt=$(s 25) ta=$(s 70) tj=$(s 20)
go j_only data=$D/a t=0 tt=$(s 20) ta=0 tj=$(s 205)
go j_mb512 data=$D/a t=0 tt=$(s 10) ta=0 tj=$(s 215) mb=512 vlr=1
wait
for f in $L/sweep_*.log; do cat $f; done >$out/sweep.txt
cat $out/sweep.txt | grep -v "^ \|Warn" | cut -c1-250 | grep -A3 "END\|Traceback\|Error" | tail -n 60; echo "done at $SECONDS s"
