#!/bin/sh
# The paper's Table 5 in the small world: the same student tuned to REWARD in six ways, at equal cost.
#
#   sh compare.sh REWARD seconds 600 OUT          # ten minutes of training each
#   sh compare.sh REWARD evaluations 20000 OUT    # as many evaluations of the reward each; VSD+CD gets LRM's iterations
#
# SEEDS (default "0 1 2"), STUDENT, PYTHON, and FLAGS for all, TRAIN_FLAGS for train.py, EVAL_FLAGS for eval.py alone can
# be set in the environment. Writes OUT/NAME-SEED, results/[curves-]tuned-REWARD-BUDGET.json, assets/tuned-REWARD-BUDGET.svg.
# ReFL and DRaFT need a reward that is differentiable; of another they are left out.
set -e
reward=$1 kind=$2 budget=$3 out=$4
python=${PYTHON:-python} student=${STUDENT:-weights/student.safetensors} name=$reward-$kind
[ "$kind" = seconds ] || [ "$kind" = evaluations ] || { echo "want seconds or evaluations, not $kind" >&2; exit 2; }

for seed in ${SEEDS:-0 1 2}; do
    common="--seed $seed --max-$kind $budget --batch 16 $FLAGS"
    train="$python train.py --student $student --fake-warmup 20 --sample-every 0 --iterations 1000000 $common $TRAIN_FLAGS"
    tune="$python ddpo.py --weights $student --reward $reward --lr 1e-4 --iterations 1000000 $common"
    $train --out "$out/vsd-cd-lrm-$seed" --reward "$reward" --lrm-warmup 20
    iterations=$(($(wc -l < "$out/vsd-cd-lrm-$seed/log.jsonl")))
    [ "$kind" = seconds ] && iterations=1000000
    $train --out "$out/vsd-cd-$seed" --iterations $iterations
    $tune --out "$out/ddpo-$seed" --method ddpo
    $tune --out "$out/ddpo-standardised-$seed" --method ddpo --advantage batch
    # ReFL looks at one of the last two steps: at the last alone it would be DRaFT-1
    $tune --out "$out/refl-$seed" --method refl --truncate 2 || echo "refl is left out"
    $tune --out "$out/draft-$seed" --method draft --truncate 1 || echo "draft is left out"
done

runs=$(ls -d "$out"/*-[0-9]*)
$python eval.py tuned $runs --reward "$reward" --start "$student" --out "results/tuned-$name.json" $EVAL_FLAGS
$python eval.py curves $runs --out "results/curves-tuned-$name.json"
$python eval.py curves "results/curves-tuned-$name.json" --out "assets/tuned-$name.svg"
