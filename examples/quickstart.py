"""Segments a photo by a point, a correction, a box, and many prompts at once.

    python examples/quickstart.py

Uses the default model (MobileSAM) and a photo from scikit-image. Writes the photo to
`astronaut.png` and the results to `quickstart.png`.
"""

from pathlib import Path

import skimage.data
from matplotlib.figure import Figure
from PIL import Image

from sam_jax import SamPredictor, from_pretrained
from sam_jax.visualize import COLORS, show_box, show_mask, show_points


def main(output: Path = Path("quickstart.png")) -> None:
    """Segments the photo in four ways and draws the results."""
    image = skimage.data.astronaut()  # 512 x 512, RGB
    Image.fromarray(image).save(output.with_name("astronaut.png"))
    predictor = SamPredictor(from_pretrained("mobile_sam"))
    predictor.set_image(image)  # the slow part, once per image

    figure = Figure(figsize=(16, 4.4), layout="constrained")
    axes = figure.subplots(1, 4)
    for ax in axes:
        ax.imshow(image)
        ax.axis("off")

    # One point is ambiguous: of the three candidates, draw the one with the highest score.
    points, labels = [[100, 300]], [1]
    masks, scores, logits = predictor.predict(points, labels)
    best = scores.argmax()
    show_mask(masks[best], axes[0])
    show_points(points, labels, axes[0])
    axes[0].set_title(f"one point (predicted IoU {scores[best]:.2f})")

    # A correction: give the chosen mask's logits and another point, on the missing part.
    points, labels = [[100, 300], [225, 45]], [1, 1]
    masks, scores, _ = predictor.predict(
        points, labels, mask_input=logits[best][None], multimask_output=False
    )
    show_mask(masks[0], axes[1])
    show_points(points, labels, axes[1])
    axes[1].set_title(f"corrected, with the head ({scores[0]:.2f})")

    # A box is rarely ambiguous: one mask is enough.
    box = [280, 345, 511, 511]
    masks, scores, _ = predictor.predict(box=box, multimask_output=False)
    show_mask(masks[0], axes[2], color=COLORS[1])
    show_box(box, axes[2])
    axes[2].set_title(f"a box ({scores[0]:.2f})")

    # Many prompts in one compiled call, here four boxes.
    boxes = [[173, 62, 275, 195], [365, 15, 460, 285], [280, 345, 511, 511], [275, 325, 345, 375]]
    masks, _, _ = predictor.predict_batch(boxes=boxes, multimask_output=False)
    for i, (mask, one) in enumerate(zip(masks, boxes, strict=True)):
        show_mask(mask[0], axes[3], color=COLORS[i])
        show_box(one, axes[3])
    axes[3].set_title("many prompts at once")

    figure.savefig(output, dpi=80)
    print(output)


if __name__ == "__main__":
    main()
