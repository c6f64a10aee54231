#!/usr/bin/env bash
# Measures everything that needs a GPU in one call: tests, accuracy and speed. Tables are appended to benchmarks/results.
#
#     benchmarks/gpu.sh [python [part...]]
#
# Parts: tests layers encoder accuracy training decoder everything memory more_tests. MobileSAM's weights come from
# SAM_JAX_CACHE or are downloaded. Needs the extra `test` and JAX with CUDA. The tables include PyTorch if it has CUDA,
# and segment-anything-fast if it is installed from GitHub (pytorch-labs/segment-anything-fast). If a part fails, the
# others run anyway, and the exit status is 1. ("cudnn" has no accuracy on GPUs other than Hopper, where cuDNN lacks
# heads of this width.)
set -uo pipefail
cd "$(git rev-parse --show-toplevel)"
export JAX_PLATFORMS=cuda,cpu  # never fall back to the CPU silently
python=${1:-python}
shift || true
command -v -- "$python" >/dev/null || { echo "gpu.sh: python is $python, which is not a command"; exit 2; }
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

# Optimized as for users: the settings in tests/conftest.py are meant for a CPU.
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
    benchmark --models vit_h vit_b --batch 8 --parts encoder --attention xla folded pallas cudnn --repeat 20
    # Without other attentions, to measure the memory of the default.
    benchmark --models vit_h --batch 8 --parts encoder --repeat 20
fi
if wants accuracy; then
    try "$python" -m benchmarks.accuracy --models mobile_sam vit_h --attention xla folded portable pallas cudnn
fi
if wants training; then
    benchmark --models vit_b --batch 8 --parts training --attention pallas cudnn --repeat 10
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
    tests tests/test_real_weights.py tests/test_sam_hq.py tests/test_predictor_*.py tests/automatic/test_generator.py \
        tests/training/test_step_*.py tests/export/test_export_*.py
fi
exit "$status"
