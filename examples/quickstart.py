"""README's story on a real photo: a point, a box, a correction, many prompts at once.

    python examples/quickstart.py

Takes the default model (MobileSAM) and a photo from scikit-image, and writes `quickstart.png`.
"""

from pathlib import Path

import skimage.data
from matplotlib.figure import Figure

from sam_jax import SamPredictor, from_pretrained
from sam_jax.visualize import COLORS, show_box, show_mask, show_points


def main(output: Path = Path("quickstart.png")) -> None:
    """Segments the photo in four ways and draws them."""
    image = skimage.data.astronaut()  # 512 x 512, RGB
    predictor = SamPredictor(from_pretrained("mobile_sam"))
    predictor.set_image(image)  # the slow part, once per picture

    figure = Figure(figsize=(16, 4.4), layout="constrained")
    axes = figure.subplots(1, 4)
    for ax in axes:
        ax.imshow(image)
        ax.axis("off")

    # One point is ambiguous: three candidates, of which the one with the best score is drawn.
    point = [[225, 130]]
    masks, scores, _ = predictor.predict(point, [1])
    show_mask(masks[scores.argmax()], axes[0])
    show_points(point, [1], axes[0])
    axes[0].set_title(f"one point (predicted IoU {scores.max():.2f})")

    # A box is not.
    box = [12, 20, 420, 511]
    masks, scores, logits = predictor.predict(box=box, multimask_output=False)
    show_mask(masks[0], axes[1], COLORS[1])
    show_box(box, axes[1])
    axes[1].set_title(f"a box ({scores[0]:.2f})")

    # A correction: the last answer's logits, and a point that does not belong.
    points, labels = [[100, 400], [225, 130]], [1, 0]
    masks, scores, _ = predictor.predict(
        points, labels, box, mask_input=logits, multimask_output=False
    )
    show_mask(masks[0], axes[2], COLORS[2])
    show_points(points, labels, axes[2])
    show_box(box, axes[2])
    axes[2].set_title(f"corrected: without the face ({scores[0]:.2f})")

    # Many prompts in one compiled call, here four boxes.
    boxes = [[173, 62, 275, 195], [365, 15, 460, 300], [280, 345, 511, 511], [135, 375, 215, 460]]
    masks, _, _ = predictor.predict_batch(boxes=boxes, multimask_output=False)
    for i, (mask, one) in enumerate(zip(masks, boxes, strict=True)):
        show_mask(mask[0], axes[3], COLORS[i])
        show_box(one, axes[3])
    axes[3].set_title("many prompts at once")

    figure.savefig(output, dpi=80)
    print(output)


if __name__ == "__main__":
    main()
