"""Images or clips to start sampling from.

Letters: T frames, H W height and width.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from EqM.data import clips, files, images
from EqM.data.media import UNREADABLE
from EqM.run import resume
from EqM.run.errors import UserError, printable, reason


class Starts(Sequence):
    """A file, or the files of a flat folder by sorted name: item i is uint8 (H, W, 3), of clips (T, H, W, 3).

    size: what H and W must be. clip_len: frames of a clip, spread evenly over the file as in training; None for
    images. In a folder that the sampler wrote only samples count. Raises UserError where nothing is found, and for
    what cannot be read or has another size.
    """

    def __init__(self, path, size, clip_len=None):
        self.clip_len = clip_len
        self.paths = [Path(path)] if os.path.isfile(path) else self._in_folder(Path(path))
        self.names = [each.name for each in self.paths]
        for each in self.paths:
            shape = self._read(each, self._shape)
            if shape != (size, size):
                raise UserError(
                    f"--start {each} has {shape[0]} x {shape[1]} pixels, and this model makes {size} x {size}; "
                    "give it that size"
                )

    def _in_folder(self, folder):
        if not folder.is_dir():
            raise UserError(f"--start {folder} is neither a file nor a folder")
        try:
            return files.flat_files(folder, bool(self.clip_len))
        except UserError as error:
            raise UserError(f"--start {error}") from None

    def _shape(self, path):
        """(width, height) as it is shown, from as little of the file as says it."""
        if self.clip_len:
            return clips.first_frame(path).size
        with Image.open(path, formats=images.image_formats()) as image:
            return image.size  # a square one stays what it is when it is turned upright

    def _frames(self, path):
        if self.clip_len is None:
            return np.asarray(images.read_image(path))
        return np.stack([np.asarray(frame) for frame in clips.decode_clip(path, self.clip_len)])

    def _read(self, path, how):
        try:
            return how(path)
        except UNREADABLE as error:
            raise UserError(f"--start {path} cannot be read: {printable(reason(error))}") from None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self._read(self.paths[index], self._frames)

    def digest(self):
        """A text that is another for other files, as far as names and sizes tell."""
        return resume.data_digest(self.names, [0] * len(self), self.paths)["digest"]
