#!/usr/bin/env bash
# Measures everything that needs a GPU in one call: tests, accuracy and speed. Tables are appended to benchmarks/results.
#
#     benchmarks/gpu.sh [python [part...]]
#
# Parts: tests layers encoder accuracy training decoder everything memory more_tests. The weights of MobileSAM are
# taken from SAM_JAX_CACHE, or downloaded. Needs the extra `test` and JAX with CUDA; PyTorch's side of the tables is
# there where PyTorch has CUDA, too, and segment-anything-fast's where it is installed from GitHub
# (pytorch-labs/segment-anything-fast). What fails does not keep the rest from running; the status at the end says
# so. (On another GPU than a Hopper "cudnn" has no accuracy: it has no heads of such a width there.)
set -uo pipefail
cd "$(git rev-parse --show-toplevel)"
export JAX_PLATFORMS=cuda,cpu  # never the CPU in silence
python=${1:-python}
shift || true
command -v -- "$python" >/dev/null || { echo "gpu.sh: python is $python, which is no command"; exit 2; }
known="tests layers encoder accuracy training decoder everything memory more_tests"
parts=" ${*:-$known} "
status=0
for part in $parts; do
    [[ " $known " == *" $part "* ]] || { echo "gpu.sh: part is $part, expected some of: $known"; exit 2; }
done

wants() {
    [[ $parts == *" $1 "* ]]
}

try() {
    echo
    echo "+ $*"
    "$@" || status=1
}

benchmark() {
    try "$python" -m benchmarks.run --device gpu --dtype bfloat16 --compile "$@"
}

# Optimised as for users: tests/conftest.py has a CPU in mind.
tests() {
    try env JAX_DISABLE_MOST_OPTIMIZATIONS=0 "$python" -m pytest -q -n 0 -W default "$@"
}

date --iso-8601
if wants tests; then
    tests tests/ops/test_attention_gpu.py tests/models tests/ops
fi
if wants layers; then
    benchmark --models vit_h vit_b --batch 8 --parts global global_gradients windows windows_gradients \
        --attention xla folded chunked "cudnn, bias" pallas cudnn --repeat 20
fi
if wants encoder; then
    benchmark --models vit_h vit_b --batch 8 --parts encoder --attention xla folded portable pallas cudnn --repeat 20
    # The memory of the default alone.
    benchmark --models vit_h --batch 8 --parts encoder --repeat 20
fi
if wants accuracy; then
    try "$python" -m benchmarks.accuracy --models mobile_sam vit_h --attention xla folded portable pallas cudnn
fi
if wants training; then
    benchmark --models vit_b --batch 8 --parts training --attention portable pallas cudnn --repeat 10
fi
if wants decoder; then
    benchmark --models vit_h mobile_sam --parts decoder predict --repeat 20
fi
if wants everything; then
    benchmark --models vit_h mobile_sam --parts everything --repeat 3
fi
if wants memory; then
    try "$python" -m benchmarks.training_memory
fi
if wants more_tests; then
    tests tests/test_real_weights.py tests/test_sam_hq.py tests/test_predictor.py tests/automatic/test_generator.py \
        tests/training/test_step.py tests/export/test_export.py
fi
exit "$status"
