"""Ours beside PyTorch, part by part: the same numbers? how much faster?

    python -m benchmarks.run
    python -m benchmarks.run --models vit_b --parts encoder --compile

Every contender has the same weights and the same random inputs, in one process. Outputs are
compared before anything is timed: who gives other numbers is not timed. Then all run in turn, warm,
again and again, each blocked until its result is there, and the median counts. "Share" is the work
per second over that of a large matrix product on the same device in the same run.

PyTorch's are Meta's code and `transformers` with its fused attention ("SDPA"), and with --compile
each of both under torch.compile, which takes minutes.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.everything import matrix_rate, models
from sam_jax.models.sam import decode, encode_image
from sam_jax.ops.prompts import join_prompts

# 2 floating-point operations per multiplication and addition, per image or per prompt.
FLOPS = {("encoder", "vit_b"): 0.96e12}
PROMPTS = 64
# The largest difference from Meta's, over the largest value of Meta's.
TOLERANCE = 2e-4
Contenders = dict[str, Callable[[], object]]


def seconds(contenders: Contenders, repeat: int) -> dict[str, float]:
    """The median time of each; all take turns, so that what else the machine does hits them all."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, run in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def first(result: object) -> np.ndarray:
    """The first array of what a contender returns, on the host."""
    while isinstance(result, tuple):
        result = result[0]
    return np.asarray(result.numpy() if isinstance(result, torch.Tensor) else result)


def agreeing(contenders: Contenders) -> tuple[Contenders, dict[str, float]]:
    """Those whose output is that of the first, and how far each is from it."""
    outputs = {name: first(run()) for name, run in contenders.items()}
    expected = next(iter(outputs.values()))
    scale = np.abs(expected).max()
    found = {
        name: float(np.abs(output.reshape(expected.shape) - expected).max() / scale)
        for name, output in outputs.items()
    }
    return {name: contenders[name] for name in found if found[name] <= TOLERANCE}, found


def hugging_face(meta: torch.nn.Module, model) -> torch.nn.Module:
    """`SamModel` with fused attention and the weights of ours."""
    import transformers

    from sam_jax.checkpoints.params import flat_params
    from sam_jax.checkpoints.torch_names import to_torch
    from sam_jax.config import to_hf

    values = {k: v for k, v in to_hf(model.config).items() if k.endswith("_config")}
    config = transformers.SamConfig(**values, attn_implementation="sdpa")
    reference = transformers.SamModel(config).eval()
    tensors = to_torch(
        {k: np.asarray(v) for k, v in flat_params(model).items()}, model.config, "hf"
    )
    reference.load_state_dict({k: torch.tensor(v) for k, v in tensors.items()}, strict=False)
    return reference


def encoders(name: str, meta: torch.nn.Module, model, compiled: bool) -> Contenders:
    pixels = np.random.default_rng(0).normal(size=(1, 1024, 1024, 3)).astype(np.float32)
    channels_first = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()
    graphdef, params = nnx.split(model)
    on_device = jnp.asarray(pixels)
    found: Contenders = {"Meta": lambda: meta.image_encoder(channels_first)}
    if name != "mobile_sam":
        encoder = hugging_face(meta, model).vision_encoder
        found["transformers, SDPA"] = lambda: encoder(channels_first).last_hidden_state
    if compiled:
        fast = torch.compile(meta.image_encoder)
        found["Meta, torch.compile"] = lambda: fast(channels_first)
        if name != "mobile_sam":
            faster = torch.compile(encoder)
            found["transformers, torch.compile"] = lambda: faster(channels_first).last_hidden_state
    found["ours"] = lambda: jnp.moveaxis(encode_image(graphdef, params, on_device), -1, 1)
    return found


def decoders(name: str, meta: torch.nn.Module, model, compiled: bool) -> Contenders:
    """A click each, three masks each, low resolution."""
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(1, 64, 64, 256)).astype(np.float32)
    clicks = rng.uniform(0, 1023, (PROMPTS, 1, 2)).astype(np.float32)
    channels_first = torch.tensor(embedding).permute(0, 3, 1, 2).contiguous()
    clicked = torch.tensor(clicks), torch.ones((PROMPTS, 1), dtype=torch.int32)

    def theirs(decoder):
        def run():
            sparse, dense = meta.prompt_encoder(points=clicked, boxes=None, masks=None)
            return decoder(
                image_embeddings=channels_first,
                image_pe=meta.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
            )

        return run

    graphdef, params = nnx.split(model)
    points, labels = join_prompts(clicks[None], np.ones((1, PROMPTS, 1), np.int32), None)
    arguments = [jnp.asarray(x) for x in (embedding, points, labels)]
    found: Contenders = {"Meta": theirs(meta.mask_decoder)}
    if compiled:
        found["Meta, torch.compile"] = theirs(torch.compile(meta.mask_decoder))
    found["ours"] = lambda: decode(graphdef, params, *arguments, None, multimask_output=True)
    return found


PARTS = {"encoder": encoders, "decoder": decoders}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_b", "mobile_sam"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="PyTorch's under torch.compile, too")
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    rate = matrix_rate()
    packages = ", ".join(f"{p} {version(p)}" for p in ("jax", "torch", "transformers"))
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    print(f"{device}, {packages}; {rate / 1e9:.0f} GFLOP/s\n")
    print("| Model, part | Who | Difference | Time | Share | Ours is faster by |")
    print("|---|---|---:|---:|---:|---:|")
    for name in args.models:
        meta, model = models(name)
        for part in args.parts:
            contenders, differences = agreeing(PARTS[part](name, meta, model, args.compile))
            times = seconds(contenders, args.repeat)
            work = FLOPS.get((part, name))
            for who, difference in differences.items():
                took = times.get(who)
                cells = [f"{name}, {part}", who, f"{difference:.0e}"]
                cells.append("differs" if took is None else f"{took:.2f} s")
                cells.append(f"{work / took / rate:.0%}" if work and took else "")
                cells.append(f"{took / times['ours']:.2f}" if took and "ours" in times else "")
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
