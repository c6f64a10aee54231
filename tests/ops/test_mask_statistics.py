import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch.nn.functional as F
import torch_reference
from logits import LOGITS
from reference import tensor

from sam_jax.ops.mask_statistics import make_upsampler, mask_statistics

pytestmark = pytest.mark.optimized


amg = torch_reference.import_reference("segment_anything").utils.amg


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("size", [(500, 333), (64, 256), (700, 1024), (7, 90), (1200, 900)])
@pytest.mark.parametrize(
    ("threshold", "offset", "tile"), [(0.0, 1.0, 64), (0.5, 0.25, 256), (0.0, 0.0, 64)]
)
def test_statistics(logits, size, threshold, offset, tile):
    scale = 1024 / max(size)
    input_size = [int(n * scale + 0.5) for n in size]
    found = jax.jit(mask_statistics)(
        jnp.asarray(logits),
        jax.device_put(make_upsampler(256, 1024, tuple(input_size), size, 2048, tile)),
        jnp.float32(threshold),
        jnp.float32(offset),
    )
    full = F.interpolate(tensor(logits)[None, None], (1024, 1024), mode="bilinear")
    full = full[..., : input_size[0], : input_size[1]]
    full = F.interpolate(full, size, mode="bilinear")[0]
    stability = amg.calculate_stability_score(full, threshold, offset)[0].item()
    assert found.box.tolist() == amg.batched_mask_to_box(full > threshold)[0].tolist()
    # Rounding may put a pixel whose logit is close to a threshold on either side of it.
    at_edges = 3 + 2e-5 * full.numel()
    for counted, level in ((found.intersection, offset), (found.union, -offset)):
        assert abs(int(counted) - (full > threshold + level).sum().item()) <= at_edges
    if found.union:
        assert abs(int(found.intersection) / int(found.union) - stability) <= 1e-3
    else:
        assert np.isnan(stability)
