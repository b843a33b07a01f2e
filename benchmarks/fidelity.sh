#!/usr/bin/env bash
# How well the offline ranking agrees with reality, on the embedded model (NIAH, 1024 and 2048 tokens, 32 prompts each):
# on the captured prompts, and on other prompts of the same task.
# Usage: benchmarks/fidelity.sh [WORK_FOLDER]; resumes when interrupted. About ten minutes on two cores.
set -euo pipefail
work=${1:-build/fidelity}
here=$(cd "$(dirname "$0")" && pwd)
kvtool=${KVTOOL:-kvtool}
policies=(-p window -p streaming -p h2o -p h2o:window=8 -p snapkv -p snapkv:window=16 -p snapkv:kernel=15
          -p snapkv:window=16,kernel=15 -p snapkv:pool=avg -p random)
budgets=4%,6%,8%,10%,15%,20%,30%,50%
pairs=()
fresh=()
for length in 1024 2048; do
    $kvtool capture -t niah -n 32 --length "$length" --seed 0 -o "$work/$length.h5"
    $kvtool simulate "$work/$length.h5" "${policies[@]}" -r "$budgets" -o "$work/sim$length" > "$work/sim$length.txt"
    $kvtool infer -t niah -n 32 --length "$length" --seed 0 "${policies[@]}" -r "$budgets" -o "$work/run$length" > "$work/run$length.txt"
    $kvtool infer -t niah -n 32 --length "$length" --seed 1000 "${policies[@]}" -r "$budgets" -o "$work/fresh$length" > "$work/fresh$length.txt"
    pairs+=("$work/sim$length" "$work/run$length")
    fresh+=("$work/sim$length" "$work/fresh$length")
done
$kvtool analyze fidelity "${pairs[@]}" -o "$work/fidelity"
$kvtool analyze fidelity "${fresh[@]}" -o "$work/fidelity_fresh"
for ending in json md; do
    cp "$work/fidelity/fidelity.$ending" "$here/results/fidelity.$ending"
    cp "$work/fidelity_fresh/fidelity.$ending" "$here/results/fidelity_fresh.$ending"
done
