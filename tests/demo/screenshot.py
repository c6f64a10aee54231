"""Makes README's image of the demo page.

    PYTHONPATH=tests/helpers python tests/demo/screenshot.py

Needs the default model (MobileSAM), a photo from scikit-image, chromium and chromedriver. Writes
`demo.png`.
"""

import tempfile
from pathlib import Path

import skimage.data
from browser import Page, open_browser, running_demo
from PIL import Image


def main(output: Path = Path("demo.png")) -> None:
    """Clicks on the astronaut's suit and hair, then on her helmet as background."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Image.fromarray(skimage.data.astronaut()).save(folder / "photo.png")
        with running_demo(folder) as address, open_browser(folder) as browser:
            browser.set_window_size(1200, 980)
            page = Page(browser, address, folder)
            page.drop(folder / "photo.png")
            for place in ((0.35, 0.62), (0.45, 0.08)):
                with page.change():
                    page.mouse(place)
            with page.change():
                page.mouse((0.75, 0.85), button="context_click")
            browser.save_screenshot(folder / "page.png")
        # 256 dithered colors halve the file size.
        with Image.open(folder / "page.png") as file:
            image = file.convert("RGB")
        palette = image.quantize(256, kmeans=4)
        image.quantize(palette=palette).save(output, optimize=True)
    print(output)


if __name__ == "__main__":
    main()
