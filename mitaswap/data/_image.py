"""One image from its bytes, strictly: a damaged one is an error that names it, never skipped."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from mitaswap.errors import MitaswapError

# what Pillow's decoders raise on damaged files, depending on the format and on where the damage is
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class SampleError(MitaswapError):
    """An image or label that cannot be used; the message names the file, the row or the path.

    It stays one line when torch re-raises it out of a `DataLoader` worker: torch calls the
    exception's class with the text of the worker's whole traceback, whose last line is the message
    that was meant.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught SampleError in "):
            message = message.rpartition("SampleError: ")[2].strip()
        super().__init__(message)


def load_image(source: bytes | str | Path | BinaryIO, where: str) -> Image.Image:
    """Decode one image to 8-bit RGB, completely.

    Args:
        source: the encoded bytes, the path of a file, or a binary file object (which is closed).
        where: which image this is, for the error message.

    Raises:
        SampleError: empty, truncated, of an unknown format, or not readable.
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else _opened(source) as file:
            data = file.read()
            if not data:
                raise SampleError(f"{where} is empty (0 bytes). Remove it or fetch it again.")
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
    except SampleError:
        raise
    except _DAMAGE as error:
        # Pillow's text for an unknown format ends in the address of a BytesIO, which tells nobody
        # anything
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise SampleError(
            f"{where} cannot be decoded: {reason or type(error).__name__}. Remove it or fetch it "
            "again."
        ) from None


def _opened(source: str | Path | BinaryIO) -> BinaryIO:
    return open(source, "rb") if isinstance(source, (str, Path)) else source
