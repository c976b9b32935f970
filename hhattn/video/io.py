"""Pictures in, H.264 out. A clip gets its name only when it is whole."""

from __future__ import annotations

import os
import secrets
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

_BT709 = 1  # in FFmpeg's tables of colour spaces, primaries and transfer functions alike
_GREY = (128, 128, 128, 255)


def check_encoder() -> None:
    """Raises ValueError if this PyAV can't write H.264."""
    try:
        av.codec.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        raise ValueError(
            "this PyAV was built without libx264, the H.264 encoder; pip install --force-reinstall av"
        ) from None


class VideoWriter:
    """``with VideoWriter(path, height, width, fps) as w: w.write(frames)``; uint8 frames ``[n, h, w, 3]``.

    Frames go to a file of this writer's own beside ``path``, ``NAME.xxxxxxxx.part``, as they come; leaving without an
    error renames it, leaving with one deletes it. Of two that write one name, the one that ends last has it.
    """

    def __init__(self, path: Path, height: int, width: int, fps: float, crf: int = 18, b_frames: bool = True):
        self.path, self.part, self.frames = path, path.with_name(f"{path.name}.{secrets.token_hex(4)}.part"), 0
        self.container = av.open(str(self.part), "w", format="mp4", options={"movflags": "faststart"})
        self.stream = self.container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        # players assume BT.709 at this size; a file that says nothing and holds BT.601 has its colours shifted
        context = self.stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = av.video.reformatter.ColorRange.MPEG
        self.stream.options = {"crf": str(crf), "preset": "veryfast"}
        if not b_frames:  # then a frame is written when it is shown, and clips of any length can be joined
            self.stream.options = {**self.stream.options, "bf": "0"}

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frames: Tensor) -> None:
        for picture in frames.numpy():
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = rgb.reformat(format="yuv420p", dst_colorspace=av.video.reformatter.Colorspace.ITU709)
            for packet in self.stream.encode(frame):
                self.container.mux(packet)
        self.frames += len(frames)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for packet in self.stream.encode():
                    self.container.mux(packet)
            self.container.close()
            if kind is None:
                os.replace(self.part, self.path)
        finally:
            self.part.unlink(missing_ok=True)


def read_picture(path: Path, height: int, width: int) -> Tensor:
    """A picture file as ``[3, height, width]`` in [0, 1]: turned as its EXIF says, cropped in the middle to the aspect,
    scaled, and what is transparent shown on grey.

    Raises ValueError if it can't be read as a picture, or has more pixels than ``Image.MAX_IMAGE_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                rgb = _fitted(ImageOps.exif_transpose(image), (width, height))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ValueError(f"image {path}: not a readable picture: it has {limit}; scale it down first") from None
    except Exception as e:  # on damaged files decoders raise whatever comes to them
        raise ValueError(f"image {path}: not a readable picture ({e})") from None
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """RGB of ``size`` (width, height). Only what is kept is scaled, so an extreme aspect costs no memory."""
    clear = "A" in image.getbands() or "transparency" in image.info
    image = ImageOps.fit(image.convert("RGBA" if clear else "RGB"), size, Image.Resampling.BICUBIC)
    if clear:
        image = Image.alpha_composite(Image.new("RGBA", size, _GREY), image)
    return image.convert("RGB")


def check_writable(path: Path) -> None:
    """Raises ValueError, before any work, if a file can't be made at ``path``."""
    try:
        if path.is_dir():
            raise ValueError(f"output {path}: is a folder; give a file name")
        if path.exists() and not path.is_file():  # renaming over a device would replace it
            raise ValueError(f"output {path}: is not a regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        # making a file tells more than permissions do: a name too long, a full disk
        tempfile.NamedTemporaryFile(prefix=f"{path.name}.", suffix=".part", dir=path.parent).close()
    except OSError as e:
        raise ValueError(f"output {path}: a file can't be made there ({e.strerror})") from None
