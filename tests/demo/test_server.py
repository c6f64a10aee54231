"""The server's process; test_app_answers.py tests its answers."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_damaged_images_are_not_logged():
    """Neither Pillow nor libtiff logs them. libtiff bypasses Python: hence another process."""
    program = r"""if True:
        import io
        from PIL import Image
        from sam_jax.demo.server import silence_decoders
        from sam_jax.image import load_image

        file = io.BytesIO()
        Image.effect_noise((64, 64), 50).convert("RGB").save(file, "TIFF", compression="tiff_lzw")
        whole = file.getvalue()
        start = int.from_bytes(whole[4:8], "little")
        entry = whole.index(b"\x15\1\3\0", start) + 8  # SamplesPerPixel
        silence_decoders()
        for damaged in (
            whole[:9],
            whole[:start] + whole[start : start + 40],
            whole[:400] + bytes([0xA5]) * 900 + whole[1300:],
            whole[:entry] + bytes([51]) + whole[entry + 1 :],
        ):
            try:
                load_image(io.BytesIO(damaged))
            except ValueError as error:
                print(error)
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.count("the file ") == 4
