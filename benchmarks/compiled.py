"""Memory and traffic of the programs that XLA compiles for an H100, on a machine without one.

    python -m benchmarks.compiled
    python -m benchmarks.compiled --models vit_h --parts encoder

Nothing runs, so there are no times, and autotuned choices may differ from those on a GPU. In
addition to the project and scikit-image, this needs `PACKAGES` in the version of JAX.

* Temporaries: memory in addition to the program's parameters, inputs and results.
* Traffic: bytes that kernels read and write, except in loops; everything mode is a loop.
* Flash: number of flash attentions, forward and backward.
* N x N: number of arrays as large as all logits of an image's global layer, in any shape.
"""

import argparse
import math
import os
import re
import sys

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax._src import xla_bridge
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.common import VITS, Table, check_at_least_one
from sam_jax.automatic.device import Frame, Points, chunk_sizes, measure, size_to_pad_to
from sam_jax.models.compiled import decode, encode_image
from sam_jax.models.sam import Sam
from sam_jax.ops import attention
from sam_jax.ops.mask_statistics import make_upsampler
from sam_jax.training.rules import EVERYTHING, adamw, partition
from sam_jax.training.step import TrainConfig, init_state, train_step

PACKAGES = (
    *("jax-cuda12-plugin", "jax-cuda12-pjrt"),
    *("nvidia-cuda-nvcc-cu12", "nvidia-cuda-runtime-cu12", "nvidia-cuda-cupti-cu12"),
)
PROMPTS = 64
# XLA's description of an H100.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 15 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100() -> Mesh:
    """A mesh with one H100 to compile for; exits if JAX cannot compile for it."""
    try:
        topology = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
    except NotImplementedError:  # raised by JAX without the CUDA plugin
        sys.exit(f"JAX cannot compile for a GPU here; install {', '.join(PACKAGES)}")
    canonicalize = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name == "gpu" else canonicalize(name)
    attention._nvidia_gpu = lambda: "9.0"
    fused_attention_stablehlo.check_cudnn_version = lambda: 91500
    fused_attention_stablehlo.check_compute_capability = lambda least: float(least) <= 9
    fused_attention_stablehlo.is_cuda_compute_capability_equal = lambda c: float(c) == 9
    return Mesh(np.array(topology.devices), ("images",))


def compiled(device: Mesh, function, *arguments, **static):
    """Compiles a jitted function for arguments of these shapes."""

    def place(x):
        sharding = NamedSharding(device, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    arguments = (x if isinstance(x, nnx.GraphDef) else jax.tree.map(place, x) for x in arguments)
    return function.trace(*arguments, **static).lower(lowering_platforms=("cuda",)).compile()


def shape(*size, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(size, dtype)


def encoder(mesh: Mesh, model: Sam, batch: int):
    return compiled(mesh, encode_image, *nnx.split(model), shape(batch, 1024, 1024, 3))


def training(mesh: Mesh, model: Sam, batch: int):
    """A step of AdamW on all parameters, one object per image."""
    tx = adamw(1e-4, EVERYTHING)
    trained, rest = partition(model, EVERYTHING)
    state = jax.eval_shape(lambda trained: init_state(trained, tx), trained)
    examples = {
        "pixel_values": shape(batch, 1024, 1024, 3),
        "masks": shape(batch, 1, 256, 256, dtype=bool),
        "boxes": shape(batch, 1, 4),
        "valid": shape(batch, 1),
    }
    step = jax.jit(train_step, static_argnames=("tx", "config"), donate_argnames=("state",))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return compiled(mesh, step, state, rest, examples, key, tx=tx, config=TrainConfig())


def decoder(mesh: Mesh, model: Sam, batch: int):
    points = shape(1, PROMPTS, 2, 2), shape(1, PROMPTS, 2, dtype=jnp.int32)
    embedding = shape(1, 64, 64, 256, dtype=jnp.bfloat16)
    arguments = *nnx.split(model), embedding, *points, None
    return compiled(mesh, decode, *arguments, multimask_output=True)


def everything(mesh: Mesh, model: Sam, batch: int):
    """A batch of points of everything mode, measured at the size of a photo of 12 megapixels."""
    chunks = chunk_sizes(PROMPTS, "gpu")
    size, input_size = (3000, 4000), (768, 1024)
    frame = Frame(
        make_upsampler(256, 1024, input_size, size, size_to_pad_to(max(size)), chunks.tile),
        np.zeros(3, np.float32),
    )
    points = Points(
        np.zeros((PROMPTS, 2), np.float32), np.zeros(PROMPTS, np.int32), np.array(PROMPTS, np.int32)
    )
    embedding = shape(1, 64, 64, 256, dtype=jnp.bfloat16)
    frame, points = jax.tree.map(lambda x: shape(1, *x.shape, dtype=x.dtype), (frame, points))
    arguments = *nnx.split(model), embedding, frame, points
    return compiled(mesh, measure, *arguments, mesh=mesh, chunks=chunks)


PARTS = {"encoder": encoder, "training": training, "decoder": decoder, "everything": everything}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8}
NOT_KERNELS = ("parameter", "bitcast", "constant", "get-tuple-element", "tuple")


def arrays(types: str) -> list[tuple[int, int]]:
    """Numbers of elements and bytes of the arrays whose types occur in HLO text."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", types)
    counts = [math.prod(int(n) for n in sizes.split(",") if n) for _, sizes in found]
    kinds = (BYTES.get(kind, 4) for kind, _ in found)
    return [(count, count * width) for count, width in zip(counts, kinds, strict=True)]


def analyze(text: str, logits: int) -> dict[str, str]:
    """Traffic and large arrays of a program's main computation.

    Args:
        text: the program's HLO.
        logits: numbers of logits of a global layer.
    """
    written, traffic, large = {}, 0, 0
    for line in text[text.index("\nENTRY") :].splitlines():
        if found := re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*)", line):
            name, types, operation, operands = found.groups()
            results = arrays(types)
            written[name] = sum(size for _, size in results)
            if operation not in NOT_KERNELS:
                names = re.findall(r"%([\w.-]+)", operands.split("), ")[0])
                traffic += written[name] + sum(written.get(other, 0) for other in names)
                large += sum(count >= logits for count, _ in results)
    names = (
        r'fmha(?:ScaleBias)?Softmax"|/flash_attention/pallas_call',
        r'fmha(?:ScaleBias)?SoftmaxBackward"|/flash_attention_backward_keys/pallas_call',
    )
    flash = [len(re.findall(rf" custom-call\(.*(?:{name})", text)) for name in names]
    return {
        "Traffic": f"{traffic / 1e9:.1f} GB",
        "Flash": ", ".join(map(str, flash)),
        "N x N": str(large),
    }


COLUMNS = ("Model, part", "Attention", "Temporaries", "Traffic", "Flash", "N x N")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_b", "vit_h"], choices=VITS)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--batch", type=int, default=8, help="images for encoder and training")
    attentions = ["xla", "folded", "portable", "cudnn, bias", "pallas", "cudnn"]
    parser.add_argument("--attention", nargs="+", default=attentions, choices=attentions)
    args = parser.parse_args()
    check_at_least_one(parser, batch=args.batch)
    mesh = h100()
    machine = f"compiled for an H100 and not run, jax {jax.__version__}"
    table = Table("What XLA compiles", COLUMNS, machine, "compiled-for-h100", texts=2)
    for name in args.models:
        config = VITS[name]()
        heads = config.image_encoder.num_heads
        for part in args.parts:
            is_encoder = part in ("encoder", "training")
            for named in args.attention if is_encoder else ("portable",):
                model = nnx.eval_shape(
                    lambda: Sam(config, dtype=jnp.bfloat16, attention=named, rngs=nnx.Rngs(0))  # noqa: B023
                )
                program = PARTS[part](mesh, model, args.batch)
                temporaries = program.memory_analysis().temp_size_in_bytes
                row = {
                    "Model, part": f"{name}, {part}",
                    "Attention": named if is_encoder else "",
                    "Temporaries": f"{temporaries / 1e9:.2f} GB",
                    **analyze(program.as_text(), args.batch * heads * 4096**2),
                }
                table.add(row)


if __name__ == "__main__":
    main()
