#!/bin/sh
# The paper's Fig. 9 in the small world: a student tuned to REWARD by its latent reward model alone, past the point where
# the pictures break; and the same held to what it was by --beta-kl (section 9).
#
#   sh overoptimise.sh REWARD OUT
#
# SEEDS (default "0 1 2"), STUDENT, PYTHON, KL (default 10), FLAGS for train.py and EVAL_FLAGS for eval.py can be set in
# the environment. Writes OUT/NAME-SEED, results/[curves-]over-REWARD.json, assets/over-REWARD.svg and assets/over-REWARD-NAME.png.
set -e
reward=$1 out=$2
[ -n "$out" ] || { echo "want: sh overoptimise.sh REWARD OUT" >&2; exit 2; }
python=${PYTHON:-python} student=${STUDENT:-weights/student.safetensors}

for seed in ${SEEDS:-0 1 2}; do
    train="$python train.py --student $student --reward $reward --seed $seed --beta-vsd 0 --beta-cd 0 --lrm-warmup 40 \
        --iterations 120 --batch 8 --global-batch 8 --ema 0.9 --reward-every 10 --reward-samples 48 --sample-every 0 $FLAGS"
    $train --out "$out/reward-$seed"
    $train --out "$out/reward-kl-$seed" --beta-kl "${KL:-10}"
done

runs=$(ls -d "$out"/*-[0-9]*)
$python eval.py tuned $runs --reward "$reward" --start "$student" --baseline before --out "results/over-$reward.json" $EVAL_FLAGS
$python eval.py curves $runs --out "results/curves-over-$reward.json"
$python eval.py curves "results/curves-over-$reward.json" --out "assets/over-$reward.svg"
first=$(echo ${SEEDS:-0} | cut -d " " -f 1)
for name in before reward reward-kl; do
    weights="$out/$name-$first/student.safetensors"
    [ "$name" = before ] && weights=$student
    rm -rf "$out/pictures-$name"
    $python sample.py --weights "$weights" --out "$out/pictures-$name" --prompt "a red star spins at night" \
        "a white ring moves left over the sea" "a large yellow heart stands still on a checkerboard"
    $python -c "import sys, PIL.Image as I; I.open(sys.argv[1]).quantize(64).save(sys.argv[2], optimize=True)" \
        "$out/pictures-$name"/*.png "assets/over-$reward-$name.png"
done
