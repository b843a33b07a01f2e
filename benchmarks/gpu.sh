#!/bin/sh
# Full cache against compressed ones on a CUDA device, until the full cache runs out of memory.
#
#     sh benchmarks/gpu.sh [OUT]      (default: benchmarks/results/gpu; a stopped run continues)
#
# First the kernels against the float64 reference, then kvtool stress on two shapes in bf16: prompts of 4K to 128K tokens, 1 and 16 at
# once, budgets of 1, 2 and 5 %, uniform (SnapKV) and ragged (AdaKV). Needs kvtool[dev] installed; PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu}
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "benchmarks/gpu.sh: there is no CUDA device here")'
mkdir -p "$out"
"$python" -m pytest -q -rs -m gpu tests/infer/test_kernels.py tests/infer/test_merge.py tests/infer/test_graphs.py > "$out/kernels.txt" || { cat "$out/kernels.txt"; exit 1; }
for shape in llama-2-7b mistral-7b; do
    for batch in 1 16; do
        "$python" -m kvtool stress -m "shape:$shape,context=131200" --device cuda --dtype bfloat16 -p snapkv -p adakv -r 1%,2%,5% --graphs \
            --length 4096 --max-length 131072 --batch "$batch" -o "$out/$shape-batch-$batch"
    done
done
