"""Automatic mask generation ("everything mode"): `SamAutomaticMaskGenerator`, with Meta's API.

An image is prompted with a grid of points. Each step computes only what the next one needs:

1. a few points at a time go through the two-way transformer, which predicts the IoUs;
2. points with at least one mask above the IoU threshold are upscaled to mask logits;
3. the box and the stability of those masks are measured at full size, tile by tile;
4. the host selects the survivors by these numbers (non-maximum suppression);
5. the survivors are decoded again and resized to full size.

Only masks of the result are kept on the device or resized to full size. The memory on the device
depends on `points_per_batch`, not on the number of masks.
"""

import copy
import dataclasses
import functools
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

from sam_jax.arrays import ArrayLike, check_mesh, is_array
from sam_jax.automatic.device import (
    Frame,
    Measured,
    Points,
    chunk_sizes,
    decode,
    encode,
    measure,
    size_to_pad_to,
)
from sam_jax.automatic.hierarchy import grid_levels, points_to_measure
from sam_jax.automatic.options import MaskGenerationOptions
from sam_jax.automatic.overlap import one_ahead, one_behind
from sam_jax.automatic.records import Crop, MaskRecord, full_size_rle
from sam_jax.automatic.selection import Candidates, join, select, without_small_regions
from sam_jax.export.openvino import encoder_for
from sam_jax.idioms import WithAdvice
from sam_jax.image import ImageInput, load_image
from sam_jax.models.sam import Sam
from sam_jax.ops.boxes import box_area, generate_crop_boxes
from sam_jax.ops.mask_statistics import make_upsampler
from sam_jax.ops.prompts import pad_axis
from sam_jax.processing import SamProcessor
from sam_jax.types import Runtime
from sam_jax.validation import check_embedding, check_model, check_sizes


class SamAutomaticMaskGenerator(WithAdvice):
    """Finds all objects in an image by prompting a grid of points.

    XLA compiles once for all image sizes (above 4096 pixels, once more for each power of two). With
    a `mesh` of several devices, `generate_batch` works on one image per device at a time.

    Args:
        model: its current parameters are used; create a new generator after changing them.
        args: options in Meta's order.
        options: options of `MaskGenerationOptions` by name.
        mesh: images are distributed over its devices, along all axes; None for the model's device.
        runtime: what runs the image encoder, as for `SamPredictor`.

    Raises:
        TypeError: if `model` is not a `Sam`, or an option is unknown.
        ValueError: if an option is invalid; the message names it.
        MissingExtra: if the runtime is not installed.
    """

    __signature__: ClassVar[inspect.Signature]

    def __init__(
        self,
        model: Sam,
        *args: Any,
        mesh: Mesh | None = None,
        runtime: Runtime = "jax",
        **options: Any,
    ):
        check_model(model)
        known = inspect.signature(MaskGenerationOptions).parameters
        if unknown := sorted(options.keys() - known.keys()):
            raise TypeError(
                f"SamAutomaticMaskGenerator has no option {', '.join(unknown)}; options are "
                f"{', '.join(known)}"
            )
        self.options = MaskGenerationOptions(*args, **options)
        self._encoder = encoder_for(model, runtime)
        self.grids = self.options.grids()
        self.mask_threshold = model.config.mask_threshold

        self.config = model.config
        self.processor = SamProcessor(model.config)
        self._dtype = model.mask_decoder.dtype
        self._graphdef, params = nnx.split(model)
        # Survivors' masks are fetched in whole batches: small batches waste little on padding.
        self._decode_batch_size = min(self.options.points_per_batch, 16)
        self._place(params, mesh)

    def _place(self, params: PyTree, mesh: Mesh | None) -> None:
        """Puts the parameters on the devices of a mesh; None for the device that they are on."""
        if mesh is None:
            (device, *_) = jax.tree.leaves(params)[0].devices()
            mesh = Mesh(np.array([device]), ("images",))
        check_mesh(mesh)
        self.mesh = mesh
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._chunks = chunk_sizes(self.options.points_per_batch, mesh.devices.flat[0].platform)

    def __getstate__(self) -> dict[str, Any]:
        # Devices cannot be pickled: an unpickled generator is on one device of its process.
        return {k: v for k, v in vars(self).items() if k not in ("mesh", "_sharding")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._place(self._params, None)

    def __deepcopy__(self, memo: dict) -> "SamAutomaticMaskGenerator":
        # Within a process the mesh is kept.
        (new := copy.copy(self))._place(copy.deepcopy(self._params, memo), self.mesh)
        return new

    def generate(self, image: ImageInput) -> list[dict[str, Any]]:
        """The masks of one image.

        Args:
            image: anything that `sam_jax.load_image` accepts.

        Returns:
            A dictionary for each mask:

            * `segmentation`: the mask in the form of `output_mode`;
            * `area`: int, in pixels;
            * `bbox`: [x, y, w, h], ints in pixels, w and h from the first pixel to the last;
            * `predicted_iou`: float, the model's prediction of the mask's IoU;
            * `point_coords`: [[x, y]], floats in pixels, the point prompt;
            * `stability_score`: float; 0 for an empty mask, where the reference has NaN;
            * `crop_box`: [x, y, w, h], ints in pixels, the crop in which the mask was found.

            Masks are sorted by predicted IoU, highest first; with crops, those of smaller crops
            come first. With `min_mask_region_area`, unchanged masks come before changed ones.

        Raises:
            TypeError, ValueError, OSError: for an image that `load_image` rejects.
            NonFiniteError: if the model predicts NaN or infinity.
        """
        (records,) = self.generate_batch([image])
        return records

    def generate_batch(
        self, images: Iterable[ImageInput], on_image: Callable[[], object] | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        """Yields what `generate` returns for each of several images of any sizes.

        Images are loaded and masks yielded one after the other, so they need not fit in memory.

        Args:
            images: an iterable of anything that `sam_jax.load_image` accepts.
            on_image: called when the masks of an image are found, to show progress. They are
                yielded later, when those of the next image are found too.

        Raises:
            TypeError: if `images` is one image instead of several.
            TypeError, ValueError, OSError: for an image that `load_image` rejects, when it is
                loaded.
            NonFiniteError: if the model predicts NaN or infinity.
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
        """What `generate` returns, for an image whose embedding is known.

        Args:
            embedding: [1, c, g, g] from `SamPredictor.get_image_embedding` of the same model.
            original_size: (h, w) of the image in pixels.
            on_batch: called with the number of batches of `points_per_batch` points that are done
                and their total, to show progress; `hierarchical` lowers the total on the way. At
                the end, with all done, it is called once for each batch of decoded masks. An
                exception in it ends the work; the device is idle while it runs.

        Raises:
            ValueError: if the embedding has another shape, or if the generator uses crops, which
                need the image.
        """
        if layers := self.options.crop_n_layers:
            raise ValueError(f"crop_n_layers is {layers}, and crops need the image: call generate")
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
        """An image's crops; masks of earlier crops win over those of later ones."""
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
        """The records of groups of images, with at most one image per device in a group.

        While the devices compute, the host loads the next images and encodes the masks found.
        """
        host = ThreadPoolExecutor(2)
        try:
            for records in one_behind(self._submitted(groups, host, on_batch, on_image)):
                yield from (record.result() for record in records)
        finally:
            # Cancel what is pending after an error or when the caller stops iterating.
            host.shutdown(cancel_futures=True)

    def _submitted(
        self,
        groups: "Iterable[list[list[Crop]]]",
        host: ThreadPoolExecutor,
        on_batch: Callable[[int, int], object] | None,
        on_image: Callable[[], object] | None,
    ) -> Iterator[list[Future]]:
        """The records, still being encoded, of the images that each turn completes."""
        for crops, pixels, done in one_ahead(self._turns(groups), host):
            self._add_masks(crops, pixels, host, on_batch)
            if on_image is not None:
                for _ in done:
                    on_image()
            yield [host.submit(self._records, image[0].found) for image in done]

    def _turns(
        self, groups: "Iterable[list[list[Crop]]]"
    ) -> "Iterator[tuple[list[Crop], list[np.ndarray], list[list[Crop]]]]":
        """One crop for each device, the encoder's inputs, and the images that are then done."""
        for images in groups:
            *turns, last = itertools.zip_longest(*images)
            for turn in (*turns, last):
                crops = [crop for crop in turn if crop is not None]
                pixels = [self.processor.preprocess(c.pixels) for c in crops if c.embedding is None]
                yield crops, pixels, images if turn is last else []

    def _add_masks(
        self,
        crops: "list[Crop]",
        pixels: list[np.ndarray],
        host: ThreadPoolExecutor,
        on_batch: Callable[[int, int], object] | None,
    ) -> None:
        """Finds the masks of one crop per device and adds them to those of its image."""
        if not pixels:
            embeddings = self._spread([crop.embedding for crop in crops])
        elif self._encoder is not None:
            embeddings = self._spread(list(self._encoder(np.stack(pixels))))
        else:
            embeddings = encode(self._graphdef, self._params, self._spread(pixels), mesh=self.mesh)
        padded_size = size_to_pad_to(max(max(crop.size) for crop in crops))
        frames = [self._frame(crop.size, padded_size) for crop in crops]
        state, spread_frames = (self._graphdef, self._params, embeddings), self._spread(frames)
        static = {"mesh": self.mesh, "chunks": self._chunks}

        measure_points = functools.partial(measure, *state, spread_frames, **static)
        found, total = self._measure(crops, measure_points, on_batch)
        chosen = [select(*one, self.options) for one in zip(crops, found, strict=True)]

        size = self._decode_batch_size
        wanted = [(masks.point, masks.mask_index) for masks in chosen]
        decoded = (
            decode(*state, points, **static) for points in self._batches(crops, wanted, size)
        )
        # The next batch is computed while one is fetched.
        ahead = itertools.pairwise(itertools.chain(decoded, [None]))
        for start, (low_res, _) in zip(itertools.count(0, size), ahead, strict=False):
            masks_of = zip(crops, frames, chosen, jax.device_get(low_res), strict=False)
            for crop, frame, masks, logits in masks_of:
                for k in range(start, min(start + size, len(masks.point))):
                    mask = crop, frame.full, masks.box[k], logits[k - start], self.mask_threshold
                    rle = host.submit(full_size_rle, *mask)
                    crop.found.append(MaskRecord.of(crop, masks, k, rle))
            if on_batch is not None:
                on_batch(total, total)

    def _measure(
        self,
        crops: "list[Crop]",
        measure_points: "Callable[[Points], Measured]",
        on_batch: Callable[[int, int], object] | None,
    ) -> "tuple[list[Candidates], int]":
        """The masks of the grids of one crop per device, and the number of batches of points."""
        size, options = self.options.points_per_batch, self.options
        levels = [grid_levels(crop.grid, options) for crop in crops]
        counts = [-(-max(map(len, points)) // size) for points in zip(*levels, strict=True)]
        found: list[list[Candidates]] = [[] for _ in crops]
        done = 0
        for k in range(len(counts)):
            wanted = [
                points_to_measure(level[k], crop, known, options)
                for level, crop, known in zip(levels, crops, found, strict=True)
            ]
            counts[k], measured = -(-max(map(len, wanted)) // size), []
            for batch in self._batches(crops, [(w, np.zeros_like(w)) for w in wanted], size):
                measured.append(measure_points(batch))
                done += 1
                if on_batch is not None:
                    jax.block_until_ready(measured[-1])
                    on_batch(done, sum(counts))
            measured = jax.device_get(measured)
            for i, (crop, points) in enumerate(zip(crops, wanted, strict=True)):
                if len(points):
                    mine = [jax.tree.map(lambda x, i=i: x[i], batch) for batch in measured]
                    mine = jax.tree.map(lambda *parts: np.concatenate(parts), *mine)
                    found[i].append(Candidates.of(crop, points, mine, options))
        return [join(parts) for parts in found], done

    def _spread(self, items: list) -> Any:
        """Stacks trees of arrays, one per device; devices without one get zeros."""

        def stack(*arrays):
            idle = self.mesh.devices.size - len(arrays)
            return np.stack([*arrays, *[np.zeros_like(arrays[0])] * idle])

        return jax.device_put(jax.tree.map(stack, *items), self._sharding)

    def _frame(self, size: tuple[int, int], padded_size: int) -> "Frame":
        """How the low-resolution masks of a crop of size (h, w) are measured."""
        config, input_size = self.config, self.processor.input_size(size)
        tile = self._chunks.tile
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
            masks: for each crop, indices of points in its grid and of masks of these points.
            size: the last batch is padded to it.
        """
        for start in range(0, max(len(point) for point, _ in masks), size):
            batch = []
            for crop, (point, mask_index) in zip(crops, masks, strict=True):
                point, mask_index = point[start : start + size], mask_index[start : start + size]
                coords = self.processor.scale_coords(crop.points[point], crop.size)
                count = np.array(len(point), np.int32)
                mask_index = pad_axis(mask_index.astype(np.int32), size, 0, 0)
                batch.append(Points(pad_axis(coords, size, 0, 0), mask_index, count))
            yield self._spread(batch)

    def _records(self, found: "list[MaskRecord]") -> list[dict[str, Any]]:
        found = [dataclasses.replace(mask, rle=mask.rle.result()) for mask in found]
        if self.options.min_mask_region_area > 0 and found:
            found = without_small_regions(found, self.options)
        return [mask.as_dict(self.options.output_mode) for mask in found]


# `help` and notebooks would otherwise show *args and **options.
SamAutomaticMaskGenerator.__signature__ = inspect.Signature(
    [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Sam),
        *inspect.signature(MaskGenerationOptions).parameters.values(),
        inspect.Parameter("mesh", inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("runtime", inspect.Parameter.KEYWORD_ONLY, default="jax"),
    ]
)
