"""Read one picture. Runs in the decode child; imports neither torch nor ray."""

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from raydistill.errors import MediaError
from raydistill.world.media import Limits, readable, require_file


def read_image(path: str, limits: Limits) -> np.ndarray:
    """Return a picture, upright, as uint8 (1, h, w, 3). Raises MediaError."""
    require_file(path, limits.max_bytes)
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked first
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP", "TIFF")) as image:
            if image.width * image.height > limits.max_pixels:
                raise MediaError(
                    "too_large", f"{image.width} x {image.height} pixels, {limits.max_pixels} allowed"
                )
            image.load()
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except UnidentifiedImageError as failed:
        raise MediaError("not_media", "no known picture format") from failed
    except MemoryError as full:
        raise MediaError("oom", "the picture needs more memory than allowed") from full
    except (OSError, ValueError, SyntaxError) as failed:  # what Pillow's parsers raise at damaged files
        reason = "truncated" if "truncated" in str(failed).lower() else "decode_error"
        raise MediaError(reason, readable(failed)) from failed
