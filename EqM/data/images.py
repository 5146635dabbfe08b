"""One picture of a file or of bytes, upright, as RGB, cropped as ADM crops.

Letters: H W height and width.
"""

import io
import warnings
from functools import cache

import numpy as np
from PIL import ExifTags, Image, ImageFile

NO_PICTURES = ("MPEG", "EPS")  # Pillow only names the one, and runs another program for the other
LONG = 32  # times its width; a longer picture is cut to its middle square before it is enlarged
TURNS = {  # EXIF orientation to what shows the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def centre_crop(image, size):
    """ADM's centre crop (Dhariwal & Nichol 2021): halve by box filter, then bicubic, then the middle.

    image: a PIL image. Returns uint8 (size, size, 3).
    """
    if max(image.size) > LONG * min(image.size):
        image = image.crop(_middle(image.size, min(image.size)))
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(max(size, round(side * scale)) for side in image.size), Image.Resampling.BICUBIC)
    return np.asarray(image.crop(_middle(image.size, size)))


def _middle(shape, size):
    """Box of the middle square of that size."""
    left, top = ((side - size) // 2 for side in shape)
    return left, top, left + size, top + size


def read_image(source):
    """A file as an upright RGB image, whatever its mode: 16-bit and floats from 0 to 1 are scaled, alpha dropped.

    source: a path, or the bytes of a file.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=image_formats()) as image:
        image.load()
        turn = TURNS.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        elif image.mode == "F":
            values = np.nan_to_num(np.asarray(image))
            if values.min() >= 0 and values.max() <= 1:
                image = Image.fromarray((255 * values).round().astype(np.uint8))
        return image.convert("RGB")


def _orientation(image):
    """The EXIF orientation, 1 (upright) where the EXIF data says nothing that can be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises anything over malformed EXIF, which is common and means nothing for the pixels
        return 1


@cache
def image_formats():
    """Names of the formats whose pixels Pillow itself reads."""
    Image.init()
    factories = {name: Image.OPEN[name][0] for name in Image.ID if name in Image.OPEN and name not in NO_PICTURES}
    stub = ImageFile.StubImageFile  # these only know a format's name
    return tuple(name for name, made in factories.items() if not (isinstance(made, type) and issubclass(made, stub)))


@cache
def image_extensions():
    return tuple(end for end, name in Image.registered_extensions().items() if name in image_formats())


def is_picture(path):
    """Whether a file without extension is a picture, by its first bytes."""
    try:
        with Image.open(path, formats=[name for name in image_formats() if Image.OPEN[name][1]]):
            return True
    except Exception:
        return False
