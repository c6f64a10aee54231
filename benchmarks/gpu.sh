#!/usr/bin/env bash
# All that a GPU has to show, in one call: tests, accuracy, tables for benchmarks/README.md.
#
#     benchmarks/gpu.sh [python]
#
# Needs the extra `test` and JAX with CUDA; PyTorch's side of the tables is there where PyTorch has CUDA,
# too, and segment-anything-fast's where it is installed from GitHub (pytorch-labs/segment-anything-fast).
# What fails does not keep the rest from running; the status at the end says so.
set -uo pipefail
cd "$(git rev-parse --show-toplevel)"
python=${1:-python}
status=0

try() {
    echo
    echo "+ $*"
    "$@" || status=1
}

benchmark() {
    try "$python" -m benchmarks.run --device gpu --dtype bfloat16 --compile "$@"
}

date --iso-8601
# Optimised as for users: tests/conftest.py has a CPU in mind.
try env JAX_DISABLE_MOST_OPTIMIZATIONS=0 "$python" -m pytest -q -n 0 -W default \
    tests/ops/test_attention_gpu.py tests/models tests/ops
benchmark --models vit_h vit_b --batch 8 --parts global global_gradients windows windows_gradients \
    --attention xla folded "cudnn, bias" cudnn --repeat 20
benchmark --models vit_h vit_b --batch 8 --parts encoder --attention xla folded cudnn --repeat 20
try "$python" -m benchmarks.accuracy --models mobile_sam vit_h --attention xla folded cudnn
benchmark --models vit_b --batch 8 --parts training --attention cudnn --repeat 10
benchmark --models vit_h mobile_sam --parts decoder predict --repeat 20
benchmark --models vit_h mobile_sam --parts everything --repeat 3
try "$python" -m benchmarks.training_memory
try env JAX_DISABLE_MOST_OPTIMIZATIONS=0 "$python" -m pytest -q -n 0 -W default tests/test_real_weights.py \
    tests/test_sam_hq.py tests/test_predictor.py tests/test_mask_generator.py tests/training/test_step.py tests/test_export.py
exit "$status"
