"""Everything-mode: `SamAutomaticMaskGenerator`, with the surface of Meta's.

A picture is prompted with a grid of points. Step by step, as little is computed as can be:

1. a few points at a time go through the two-way transformer, which gives the predicted IoUs;
2. points of which a mask may be good enough go on to the upscaling, which gives its logits;
3. those masks are measured at full size, tile by tile: box and stability;
4. the host picks the survivors by these numbers (non-maximum suppression);
5. survivors are decoded again, and only they become full-size masks.

So no mask is kept on the device, or made at full size, that is not in the result. What the device
holds depends on `points_per_batch`, not on how many masks there are.
"""

import copy
import dataclasses
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from PIL import Image

from sam_jax.arrays import ArrayLike, is_array
from sam_jax.automatic.device import (
    Frame,
    Measured,
    Points,
    decode,
    encode,
    measure,
    points_at_once,
    size_to_pad_to,
)
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.records import Crop, MaskRecord, Survivors, xywh
from sam_jax.idioms import WithAdvice
from sam_jax.image import ImageInput, load_image
from sam_jax.models.sam import Sam
from sam_jax.ops.boxes import (
    box_area,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_box,
    non_maximum_suppression,
)
from sam_jax.ops.mask_statistics import make_upsampler
from sam_jax.ops.prompts import pad_axis
from sam_jax.ops.regions import remove_small_regions
from sam_jax.ops.rle import rle_area, rle_compress, rle_decode, rle_encode
from sam_jax.predictor import check_scores
from sam_jax.processing import SamProcessor
from sam_jax.validation import check_embedding, check_model, check_sizes


class SamAutomaticMaskGenerator(WithAdvice):
    """Finds all objects of a picture by prompting a grid of points.

    Compiled once, for pictures of every size (above 4096 pixels once more for each power of two).
    With a `mesh` of several devices, `generate_batch` works on as many pictures at a time, one on
    each device.

    Args:
        model: its parameters are taken as they are now; make a new generator after changing them.
        args: options in Meta's order.
        options: those of `MaskGenerationOptions`.
        mesh: of the devices that images are spread over, along all its axes; None for the device
            that the model is on.

    Raises:
        ValueError: for an invalid option; the message says which.
    """

    __signature__: ClassVar[inspect.Signature]

    def __init__(self, model: Sam, *args: Any, mesh: Mesh | None = None, **options: Any):
        check_model(model)
        self.options = MaskGenerationOptions(*args, **options)
        self.grids = self.options.grids()
        self.mask_threshold = model.config.mask_threshold

        self.config = model.config
        self.processor = SamProcessor(model.config)
        self._dtype = model.mask_decoder.dtype
        self._graphdef, params = nnx.split(model)
        # Whole groups of survivors' masks are fetched from the device: small ones waste little.
        self._kept_at_once = min(self.options.points_per_batch, 16)
        self._place(params, mesh)

    def _place(self, params: PyTree, mesh: Mesh | None) -> None:
        """Puts parameters on the devices of a mesh, None for one of the device they are on."""
        if mesh is None:
            (device, *_) = jax.tree.leaves(params)[0].devices()
            mesh = Mesh(np.array([device]), ("images",))
        self.mesh = mesh
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._at_once = points_at_once(self.options.points_per_batch, mesh.devices.flat[0].platform)

    def __getstate__(self) -> dict[str, Any]:
        # Devices cannot be pickled: a generator comes back on one device of the process.
        return {k: v for k, v in vars(self).items() if k not in ("mesh", "_sharding")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._place(self._params, None)

    def __deepcopy__(self, memo: dict) -> "SamAutomaticMaskGenerator":
        # In the same process the mesh stays.
        (new := copy.copy(self))._place(copy.deepcopy(self._params, memo), self.mesh)
        return new

    def generate(self, image: ImageInput) -> list[dict[str, Any]]:
        """The masks of one picture.

        Args:
            image: whatever `sam_jax.load_image` takes.

        Returns:
            A record for each mask, a dictionary of

            * `segmentation`: see `output_mode`;
            * `area`: int, in pixels;
            * `bbox`: [x, y, w, h], ints in pixels, w and h from the first pixel to the last;
            * `predicted_iou`: float, what the model expects;
            * `point_coords`: [[x, y]], floats, the point that gave the mask;
            * `stability_score`: float; 0 for an empty mask, where the reference has NaN;
            * `crop_box`: [x, y, w, h], ints, the crop that gave the mask.

            Without crops, the best predicted IoU comes first, otherwise the smallest crop; with
            `min_mask_region_area` those before both that it did not change.

        Raises:
            TypeError, ValueError, OSError: for a picture that `load_image` cannot take.
            NonFiniteError: if the model predicts NaN or infinity.
        """
        (records,) = self.generate_batch([image])
        return records

    def generate_batch(
        self, images: Iterable[ImageInput], on_image: Callable[[], object] | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """The masks of several pictures, of any sizes: one after the other what `generate` returns.

        Pictures are taken from `images`, and their masks given, as the work goes on, so that there
        may be more of them than fit the memory.

        Args:
            images: whatever `sam_jax.load_image` takes, each.
            on_image: called when the masks of an image are found, to show progress. They are
                yielded later, when those of the next are found, too.

        Raises:
            NonFiniteError: if the model predicts NaN or infinity.
            FileNotFoundError, TypeError, ValueError: for one picture instead of several at once,
                and as `load_image` when it is a picture's turn.
        """
        if is_array(images) or isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError(
                f"images is a {type(images).__name__}, expected a list of images, such as "
                "list(images) of an array [n, h, w, 3]; generate takes one image"
            )
        arrays, devices = map(load_image, images), self.mesh.devices.size
        groups = iter(lambda: list(itertools.islice(arrays, devices)), [])
        crops = ([self._crops(a.shape[:2], a) for a in group] for group in groups)
        return self._generate(crops, on_image=on_image)

    def generate_from_embedding(
        self,
        embedding: ArrayLike,
        original_size: tuple[int, int],
        *,
        on_batch: Callable[[int, int], object] | None = None,
    ) -> list[dict[str, Any]]:
        """What `generate` returns for a picture whose embedding is known.

        Args:
            embedding: [1, c, g, g] of `SamPredictor.get_image_embedding`, of the same model.
            original_size: (h, w) of the picture.
            on_batch: called with how many batches of `points_per_batch` points are done, and how
                many there are, to show progress; at the end, with all done, for each group of masks
                that are decoded. What it raises ends the work, and while it waits the device rests.

        Raises:
            ValueError: for another shape, and with crops, of which there are no embeddings.
        """
        if layers := self.options.crop_n_layers:
            raise ValueError(
                f"crop_n_layers is {layers}, and crops need the picture: call generate"
            )
        embedding = check_embedding(embedding, self.config).astype(self._dtype)
        (size,) = check_sizes([original_size], 1, "original_size")
        (records,) = self._generate([[self._crops(size, embedding=embedding)]], on_batch)
        return records

    def _crops(
        self,
        size: tuple[int, int],
        image: np.ndarray | None = None,
        embedding: np.ndarray | None = None,
    ) -> "list[Crop]":
        """A picture's crops, those first whose masks win over others'."""
        boxes, layers = generate_crop_boxes(
            size, self.options.crop_n_layers, self.options.crop_overlap_ratio
        )
        order = np.argsort(-1 / box_area(np.array(boxes)), kind="stable")
        found: list[MaskRecord] = []
        return [Crop(size, boxes[i], self.grids[layers[i]], image, embedding, found) for i in order]

    def _generate(
        self,
        groups: "Iterable[list[list[Crop]]]",
        on_batch: Callable[[int, int], object] | None = None,
        on_image: Callable[[], object] | None = None,
    ) -> Iterator[list[dict[str, Any]]]:
        """The records of groups of at most as many pictures as there are devices.

        While the devices work, the host reads what comes next and encodes what they have found.
        """
        host = ThreadPoolExecutor(2)
        try:
            before: list[Future] = []
            for crops, pixels, done in _one_ahead(self._turns(groups), host):
                self._add_masks(crops, pixels, host, on_batch)
                if on_image is not None:
                    for _ in done:
                        on_image()
                records = [host.submit(self._records, picture[0].found) for picture in done]
                yield from (future.result() for future in before)
                before = records
            yield from (future.result() for future in before)
        finally:
            # What an error, or whoever wants no more, leaves undone.
            host.shutdown(cancel_futures=True)

    def _turns(
        self, groups: "Iterable[list[list[Crop]]]"
    ) -> "Iterator[tuple[list[Crop], list[np.ndarray], list[list[Crop]]]]":
        """A crop for each device that has one, what its encoder takes, and pictures then done."""
        for pictures in groups:
            *turns, last = itertools.zip_longest(*pictures)
            for turn in (*turns, last):
                crops = [crop for crop in turn if crop is not None]
                pixels = [self.processor.preprocess(c.pixels) for c in crops if c.embedding is None]
                yield crops, pixels, pictures if turn is last else []

    def _add_masks(
        self,
        crops: "list[Crop]",
        pixels: list[np.ndarray],
        host: ThreadPoolExecutor,
        on_batch: Callable[[int, int], object] | None,
    ) -> None:
        """Finds the masks of a crop on each device and adds them to those of its picture."""
        if pixels:
            embeddings = encode(self._graphdef, self._params, self._spread(pixels), mesh=self.mesh)
        else:
            embeddings = self._spread([crop.embedding for crop in crops])
        padded_size = size_to_pad_to(max(max(crop.size) for crop in crops))
        frames = [self._frame(crop.size, padded_size) for crop in crops]
        state, spread_frames = (self._graphdef, self._params, embeddings), self._spread(frames)
        static = {"mesh": self.mesh, "at_once": self._at_once}

        every = [(np.arange(len(crop.grid)), np.zeros(len(crop.grid), int)) for crop in crops]
        size, measured = self.options.points_per_batch, []
        total = -(-max(len(crop.grid) for crop in crops) // size)
        for points in self._batches(crops, every, size):
            measured.append(measure(*state, spread_frames, points, **static))
            if on_batch is not None:
                jax.block_until_ready(measured[-1])
                on_batch(len(measured), total)
        measured = jax.device_get(measured)
        chosen = []
        for i, crop in enumerate(crops):
            mine = [jax.tree.map(lambda x, i=i: x[i], batch) for batch in measured]
            mine = jax.tree.map(lambda *parts: np.concatenate(parts), *mine)
            chosen.append(self._choose(crop, mine))

        size, wanted = self._kept_at_once, [(masks.point, masks.which) for masks in chosen]
        decoded = (
            decode(*state, points, **static) for points in self._batches(crops, wanted, size)
        )
        # The next are computed while some are fetched.
        ahead = itertools.pairwise(itertools.chain(decoded, [None]))
        for start, (low_res, _) in zip(itertools.count(0, size), ahead, strict=False):
            masks_of = zip(crops, frames, chosen, jax.device_get(low_res), strict=False)
            for crop, frame, masks, logits in masks_of:
                for k in range(start, min(start + size, len(masks.point))):
                    rle = host.submit(self._rle, crop, frame, masks.box[k], logits[k - start])
                    crop.found.append(MaskRecord.of(crop, masks, k, rle))
            if on_batch is not None:
                on_batch(total, total)

    def _spread(self, items: list) -> Any:
        """Trees of arrays, one for each device, stacked; devices without one get zeros."""

        def stack(*arrays):
            idle = self.mesh.devices.size - len(arrays)
            return np.stack([*arrays, *[np.zeros_like(arrays[0])] * idle])

        return jax.device_put(jax.tree.map(stack, *items), self._sharding)

    def _frame(self, size: tuple[int, int], padded_size: int) -> "Frame":
        """How the low-resolution masks of a crop of (h, w) are measured."""
        config, input_size = self.config, self.processor.input_size(size)
        tile = self._at_once.tile
        full = make_upsampler(
            config.mask_size, config.image_size, input_size, size, padded_size, tile
        )
        options = self.options
        limits = [options.pred_iou_thresh, self.mask_threshold, options.stability_score_offset]
        return Frame(full, np.array(limits, np.float32))

    def _batches(
        self, crops: "list[Crop]", masks: list[tuple[np.ndarray, np.ndarray]], size: int
    ) -> "Iterator[Points]":
        """`size` points at a time for each device.

        Args:
            crops: one for each device.
            masks: for each crop which points of its grid, and which of a point's masks.
            size: the last are padded to it.
        """
        for start in range(0, max(len(point) for point, _ in masks), size):
            batch = []
            for crop, (point, which) in zip(crops, masks, strict=True):
                point, which = point[start : start + size], which[start : start + size]
                coords = self.processor.scale_coords(crop.points[point], crop.size)
                count = np.array(len(point), np.int32)
                which = pad_axis(which.astype(np.int32), size, 0, 0)
                batch.append(Points(pad_axis(coords, size, 0, 0), which, count))
            yield self._spread(batch)

    def _choose(self, crop: "Crop", measured: "Measured") -> "Survivors":
        """The masks of a crop that are kept, in the order of the result."""
        count = len(crop.grid)
        iou, box, intersection, union = (
            np.asarray(array[:count]).reshape(-1, *array.shape[2:])
            for array in (measured.iou, *measured.statistics)
        )
        check_scores(iou)
        with np.errstate(invalid="ignore"):
            stability = intersection.astype(np.float32) / union.astype(np.float32)
        x0, y0, _, _ = crop.box
        box = box + np.array([x0, y0, x0, y0])
        keep = ~is_box_near_crop_edge(box, crop.box, crop.image_size)
        if self.options.pred_iou_thresh > 0:
            keep &= iou > np.float32(self.options.pred_iou_thresh)
        if self.options.stability_score_thresh > 0:
            keep &= stability >= np.float32(self.options.stability_score_thresh)
        (index,) = np.nonzero(keep)
        kept = non_maximum_suppression(
            box[index], iou[index], iou_threshold=self.options.box_nms_thresh
        )
        index = index[kept]
        if self.options.crop_n_layers:
            # What earlier crops have found comes first, then this crop's in their order.
            boxes = np.concatenate(
                [np.array([m.box for m in crop.found]).reshape(-1, 4), box[index]]
            )
            kept = non_maximum_suppression(
                boxes,
                -np.arange(len(boxes), dtype=np.float32),
                iou_threshold=self.options.crop_nms_thresh,
            )
            index = index[kept[kept >= len(crop.found)] - len(crop.found)]
        point, which = np.divmod(index, measured.iou.shape[1])
        return Survivors(point, which, iou[index], np.nan_to_num(stability[index]), box[index])

    def _rle(self, crop: "Crop", frame: "Frame", box: np.ndarray, logits: np.ndarray) -> dict:
        """Run lengths of a mask at full size."""
        x0, y0, x1, y1 = box
        left, top, _, _ = crop.box
        # Outside its box the mask is empty.
        rows, columns = (
            frame.full.rows[y0 - top : y1 - top + 1],
            frame.full.columns[x0 - left : x1 - left + 1],
        )
        height, width = crop.image_size
        # Column by column in memory, as run lengths go.
        mask = np.zeros((width, height), bool).T
        mask[y0 : y1 + 1, x0 : x1 + 1] = rows @ logits @ columns.T > self.mask_threshold
        return rle_encode(mask)

    def _records(self, found: "list[MaskRecord]") -> list[dict[str, Any]]:
        found = [dataclasses.replace(mask, rle=mask.rle.result()) for mask in found]
        if self.options.min_mask_region_area > 0 and found:
            found = self._without_small_regions(found)
        return [
            {
                "segmentation": self._segmentation(mask.rle),
                "area": rle_area(mask.rle),
                "bbox": xywh(mask.box),
                "predicted_iou": mask.predicted_iou,
                "point_coords": [mask.point],
                "stability_score": mask.stability_score,
                "crop_box": xywh(mask.crop_box),
            }
            for mask in found
        ]

    def _without_small_regions(self, found: "list[MaskRecord]") -> "list[MaskRecord]":
        """Holes filled and islands dropped; of masks that now are the same, the unchanged stay."""
        options, masks, scores = self.options, [], []
        for one in found:
            mask, changed = remove_small_regions(rle_decode(one.rle), options.min_mask_region_area)
            if changed:
                one = dataclasses.replace(one, rle=rle_encode(mask), box=mask_to_box(mask))
            masks.append(one)
            scores.append(float(not changed))
        threshold = max(options.box_nms_thresh, options.crop_nms_thresh)
        boxes = np.array([mask.box for mask in masks])
        kept = non_maximum_suppression(boxes, np.array(scores), iou_threshold=threshold)
        return [masks[i] for i in kept]

    def _segmentation(self, rle: dict) -> Any:
        if self.options.output_mode == "binary_mask":
            return rle_decode(rle)
        return rle_compress(rle) if self.options.output_mode == "coco_rle" else rle


def _one_ahead(items: Iterator, host: ThreadPoolExecutor) -> Iterator:
    """The items, each of which is made while the one before is worked on."""
    following = host.submit(next, items, None)
    while (item := following.result()) is not None:
        following = host.submit(next, items, None)
        yield item


# For `help` and notebooks, which would show *args and **options.
SamAutomaticMaskGenerator.__signature__ = inspect.Signature(
    [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Sam),
        *inspect.signature(MaskGenerationOptions).parameters.values(),
        inspect.Parameter("mesh", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]
)
