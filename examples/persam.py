"""Finds an object from one image in another: PerSAM without training (Zhang et al. 2023).

    python examples/persam.py

Uses the default model (MobileSAM) and two images of a motorcycle from scikit-image, the second one
mirrored. Writes `persam.png`. The similarity of each position of an image to the object guides the
decoder in three ways: points at the most and the least similar position, attention weighted by the
similarity, and the object's embedding added to the tokens.
"""

from pathlib import Path

import jax
import numpy as np
import skimage.data
from matplotlib.figure import Figure

from sam_jax import Sam, SamPredictor, SamProcessor, from_pretrained
from sam_jax.visualize import show_box, show_mask, show_points


def embed(model: Sam, image: np.ndarray) -> np.ndarray:
    """The image embedding, channels first [1, 256, 64, 64]."""
    pixels = SamProcessor(model.config)(image)["pixel_values"]
    return np.asarray(model.get_image_embeddings(pixels))


def cells(model: Sam, embedding: np.ndarray) -> np.ndarray:
    """The embedding by grid position [64, 64, 256], without the early layer that SAM-HQ appends."""
    return np.moveaxis(embedding[0, : model.config.prompt_embed_dim], 0, -1)


def object_embedding(model: Sam, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean embedding [256] of the area of the mask [h, w]."""
    size, grid = model.config.image_size, model.config.image_embedding_size
    shape = SamProcessor(model.config).input_size(mask.shape)
    covered = np.asarray(jax.image.resize(mask.astype(np.float32), shape, "linear"))
    covered = np.pad(covered, [(0, size - n) for n in shape])
    weights = covered.reshape(grid, size // grid, grid, size // grid).mean((1, 3))
    return np.einsum("hwc,hw->c", cells(model, embed(model, image)), weights) / weights.sum()


def similarity(embedding: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The cosine similarity of the target [c] and each position of an embedding [g, g, c]."""
    norms = np.linalg.norm(embedding, axis=-1) * np.linalg.norm(target)
    return embedding @ target / norms


def enlarge(model: Sam, alike: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes the similarity [g, g] to an image of `size` (h, w), as masks are resized."""
    processor, side = SamProcessor(model.config), model.config.mask_size
    logits = jax.image.resize(alike, (side, side), "linear")[None, None, None]
    inputs = [processor.input_size(size)]
    return processor.post_process_masks(logits, [size], inputs, binarize=False)[0][0, 0]


def find(model: Sam, image: np.ndarray, target: np.ndarray):
    """The object's mask [h, w] in another image, two clicks [2, 2], and the similarity [g, g]."""
    processor, size = SamProcessor(model.config), image.shape[:2]
    embedding = embed(model, image)
    alike = similarity(cells(model, embedding), target)

    # Location prior: the most and the least similar position, in pixels of the image.
    full = enlarge(model, alike, size)
    clicks = [np.unravel_index(i, size)[::-1] for i in (full.argmax(), full.argmin())]
    points, labels = np.array(clicks, np.float32), np.array([1, 0])

    # Target-guided attention and target-semantic prompting. (The original stretches the similarity
    # without padding over the whole grid; here each position keeps its own.)
    cell = model.config.image_size // model.config.image_embedding_size
    height, width = (-(-n // cell) for n in processor.input_size(size))
    inside = alike[:height, :width]  # the rest is padding
    outputs = model(
        image_embeddings=embedding,
        input_points=processor.scale_coords(points, size)[None, None],
        input_labels=labels[None, None],
        multimask_output=False,
        attention_similarity=jax.nn.sigmoid((alike - inside.mean()) / inside.std()).reshape(-1),
        target_embedding=target,
    )

    # Refined twice: by the mask, then by the mask and its box.
    predictor = SamPredictor(model)
    predictor.set_image_embedding(embedding, size)
    logits, box = np.asarray(outputs.pred_masks)[0, 0], None
    for _ in range(2):
        masks, scores, found = predictor.predict(points, labels, box, mask_input=logits)
        best = scores.argmax()
        logits = found[[best]]
        if masks[best].any():
            rows, columns = np.nonzero(masks[best])
            box = [columns.min(), rows.min(), columns.max(), rows.max()]
    return masks[best], points, alike


def main(output: Path = Path("persam.png")) -> tuple[np.ndarray, np.ndarray]:
    """Marks an object in one image, finds it in the other, and draws both."""
    left, right, _ = skimage.data.stereo_motorcycle()
    other = np.ascontiguousarray(right[:, ::-1])
    model = from_pretrained("mobile_sam")
    predictor = SamPredictor(model)
    predictor.set_image(left)
    box = [110, 150, 340, 270]  # the seat
    shown, _, _ = predictor.predict(box=box, multimask_output=False)
    found, points, alike = find(model, other, object_embedding(model, left, shown[0]))

    figure = Figure(figsize=(14, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].imshow(left)
    show_mask(shown[0], axes[0])
    show_box(box, axes[0])
    axes[0].set_title("shown")
    height, width = SamProcessor(model.config).input_size(other.shape[:2])
    grid = model.config.image_size // model.config.image_embedding_size
    axes[1].imshow(alike[: height // grid, : width // grid], cmap="viridis")
    axes[1].set_title("how alike")
    axes[2].imshow(other)
    show_mask(found, axes[2])
    show_points(points, [1, 0], axes[2])
    axes[2].set_title("found")
    for ax in axes:
        ax.axis("off")
    figure.savefig(output, dpi=80)
    print(output)
    return found, points


if __name__ == "__main__":
    main()
