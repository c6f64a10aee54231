import io
import threading
import time

import numpy as np
import pytest
from PIL import Image
from reference import SHALLOW, meta_sam, ours

from sam_jax.demo import app


@pytest.fixture(scope="module")
def small():
    return ours(meta_sam(SHALLOW), SHALLOW)


@pytest.fixture(scope="module")
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (71, 113, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def endless(monkeypatch):
    """Replaces everything mode by a loop that ends only when it is stopped."""

    class Endless:
        running, stopped, steps = threading.Event(), threading.Event(), 0

        def __call__(self, model, image, points_per_side, on_batch):
            self.running.set()
            try:
                while True:
                    on_batch(3, 1000)
                    self.steps += 1
                    time.sleep(0.01)
            except BaseException:
                self.stopped.set()
                raise

    monkeypatch.setattr(app, "find_everything", endless := Endless())
    return endless
