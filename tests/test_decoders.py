import io

import numpy as np
import pytest
from PIL import Image

from sam_jax.decoders import DecoderError, check_decoder


def opened(image_format):
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(file, image_format)
    return Image.open(file)


def test_formats_that_a_program_decodes_are_refused():
    for image_format in ("PNG", "JPEG", "TIFF", "WEBP"):
        check_decoder(opened(image_format))
    with pytest.raises(DecoderError, match=r"format is EPS, expected one of AVIF"):
        check_decoder(opened("EPS"))
    check_decoder(Image.new("RGB", (4, 5)))  # in memory: nothing is left to decode
