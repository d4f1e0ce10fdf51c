#!/bin/sh
# The paper's Table 3 in the small world: what VSD and CD bring alone and together, and who gives CD's target (Eq. 6).
#
#   sh ablate.sh OUT          # 8 trainings of 130 updates each; 70 minutes of one core
#
# SEEDS (default "0 1"; the other two targets get the first alone), PYTHON, and FLAGS for train.py, EVAL_FLAGS for eval.py
# can be set in the environment. Writes OUT/NAME-SEED and results/ablation-NAME-SEED.json, results/ablation-teacher.json.
set -e
out=$1
[ -n "$out" ] || { echo "want: sh ablate.sh OUT" >&2; exit 2; }
python=${PYTHON:-python}
world="$python eval.py world --prompts 640 --vendi-prompts 32 $EVAL_FLAGS"

ablate() {  # NAME SEED, and the flags that make it
    run=$1-$2 name="$1, seed $2" seed=$2
    shift 2
    $python train.py --seed "$seed" --sample-every 0 $FLAGS "$@" --out "$out/$run"
    $world --weights "$out/$run/student.safetensors" --steps 4 2 1 --label "$name" --out "results/ablation-$run.json"
}

$world --weights weights/teacher.safetensors --steps 4 2 1 --label teacher --out results/ablation-teacher.json
for seed in ${SEEDS:-0 1}; do
    ablate vsd-cd "$seed"
    ablate vsd "$seed" --beta-cd 0
    ablate cd "$seed" --beta-vsd 0
    [ -n "$others" ] && continue
    others=done
    ablate cd-to-student "$seed" --beta-vsd 0 --cd-target student
    ablate cd-to-teacher "$seed" --beta-vsd 0 --cd-target teacher
done
