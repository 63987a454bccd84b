"""Image files in one directory per class (ImageFolder), labelled as timm's reader does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image

from mitaswap.data._base import SETS, ImageSet, file_mark
from mitaswap.data._image import load_image
from mitaswap.data._layout import holds_parquet, pick, split_directories, split_of
from mitaswap.errors import MitaswapError
from mitaswap.spec import Value

#: images that Pillow or torchvision may not read, or read as one of several frames
_OTHER = (
    *(".apng", ".avif", ".cr2", ".dds", ".dng", ".exr", ".gif", ".heic", ".heif", ".j2k", ".jfif"),
    *(".jp2", ".jpe", ".jxl", ".nef", ".pbm", ".pnm", ".qoi", ".svg", ".tga"),
)


@SETS.register("folder")
class Folder(ImageSet):
    """`ROOT/class/image.png` or `ROOT/split/class/image.png`.

    Classes are the names of the directories that hold the images, sorted as timm sorts them
    (numbers by value). Files are those that torchvision's ImageFolder takes (png, jpeg, webp, bmp,
    tiff, ppm, pgm); an image of another kind is an error, other files are passed over.

    Args:
        split: a sub-directory of `root`, or a synonym of one; None takes the held-out one. A root
            without such sub-directories is one whole, unless its own name says which split it is.
        root: the directory.
        class_map: a text file that gives the order of the classes, as timm's `--class-map`.
    """

    def __init__(self, split: str | None, *, root: str, class_map: str | None = None) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise MitaswapError(
                f"no directory {root!r}. Give a directory with one sub-directory per class."
            )
        parts = split_directories(self.root)
        if parts:
            taken = pick(split, parts, repr(root))
            self.root = parts[taken]
        else:
            own = split_of(Path(self.root.name))
            taken = pick(split or own, [own] if own else [], repr(root))
        from timm.data import create_dataset
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self._refuse_others(IMG_EXTENSIONS)
        try:
            # timm's name for the extensions; by itself it drops all but .png, .jpg and .jpeg
            options: dict[str, Any] = {"input_key": ";".join(IMG_EXTENSIONS)}
            if class_map:  # timm takes a path as well as the mapping that it declares
                options["class_map"] = class_map
            reader = create_dataset("", root=str(self.root), search_split=False, **options).reader
        except (RuntimeError, AssertionError, OSError, ValueError) as error:
            reason = str(error).partition(". Supported image extensions")[0]  # not those of here
            raise MitaswapError(
                f"{str(self.root)!r} is no directory of class folders: {reason}. Expected "
                f"CLASS/IMAGE files ({' '.join(IMG_EXTENSIONS)}) in it, or parquet shards."
            ) from None
        self._files: list[tuple[str, int]] = reader.samples
        names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
        if "" in names:
            loose = next(path for path, label in self._files if label == reader.class_to_idx[""])
            raise MitaswapError(
                f"{loose!r} lies beside the class folders of {str(self.root)!r}, so it has no "
                "class. Move it into one."
            )
        super().__init__(taken, len(self._files), len(names), names)

    def _refuse_others(self, read: tuple[str, ...]) -> None:
        """An image that would be dropped is an error; hidden files are none of the data set."""
        for folder, _, names in os.walk(self.root, followlinks=True):
            if Path(folder) == self.root:
                continue
            odd = sorted(n for n in names if n.lower().endswith(_OTHER) and n[0] != ".")
            if odd:
                raise MitaswapError(
                    f"{os.path.join(folder, odd[0])!r} is an image of a kind that class folders "
                    f"are not read with ({' '.join(read)}), so it would be left out. Convert it, "
                    "or move it out of the class folders."
                )

    @classmethod
    def claims(cls, name: str) -> dict[str, Value] | None:
        """Any directory that holds no parquet shards."""
        path = Path(name)
        return {"root": name} if path.is_dir() and not holds_parquet(path) else None

    def _sample(self, index: int) -> tuple[Image.Image, int]:
        path, label = self._files[index]
        return load_image(path, self._where(index)), label

    def _identity(self) -> Any:
        return [
            [os.path.relpath(path, self.root), label, *file_mark(path)]
            for path, label in self._files
        ]

    def _where(self, index: int | None) -> str:
        return repr(str(self.root)) if index is None else f"the image {self._files[index][0]!r}"
