"""Pictures in, H.264 out: what is written is what is read back, and a file is whole or not there."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hhattn.video.io import VideoWriter, check_encoder, check_writable, read_picture

H, W = 48, 96
COLORS = torch.tensor([[220, 40, 40], [40, 200, 60], [50, 60, 220], [230, 210, 60], [128, 128, 128]]).byte()


def flat_frames() -> Tensor:
    return COLORS[:, None, None].expand(-1, H, W, -1)


def read_back(path: Path) -> tuple[av.VideoStream, np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [f.reformat(format="rgb24", src_colorspace="ITU709") for f in container.decode(stream)]
        return stream, np.stack([f.to_ndarray() for f in frames])


@pytest.mark.parametrize("fps", [8, 16, 24, 29.97, 23.976])
def test_a_clip_comes_back(tmp_path: Path, fps: float) -> None:
    out = tmp_path / "clip.mp4"
    with VideoWriter(out, H, W, fps) as writer:
        writer.write(flat_frames()[:2])
        writer.write(flat_frames()[2:])
        assert not out.exists(), "the name is taken before the clip is whole"
    stream, frames = read_back(out)
    assert stream.codec_context.name == "h264"
    assert stream.codec_context.pix_fmt == "yuv420p", "what players and browsers show"
    context = stream.codec_context
    assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1), "players would guess"
    assert stream.average_rate == Fraction(fps).limit_denominator(1000)
    assert writer.frames == len(frames) == 5
    assert np.abs(frames.astype(int) - flat_frames().numpy().astype(int)).mean() < 4, "colours are mixed up"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    data = out.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "a browser has to load all of it before it plays"


def test_a_missing_encoder_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    check_encoder()

    def unknown(*_: object) -> None:
        raise av.codec.codec.UnknownCodecError("libx264")

    monkeypatch.setattr(av.codec, "Codec", unknown)
    with pytest.raises(ValueError, match="libx264"):
        check_encoder()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_clip_that_breaks_off_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "clip.mp4"

    def breaks() -> None:
        with VideoWriter(out, H, W, 16) as writer:
            writer.write(flat_frames())
            raise error("lost power")

    with pytest.raises(error, match="lost power"):
        breaks()
    assert not list(tmp_path.iterdir())
    out.write_bytes(b"older")
    with pytest.raises(error, match="lost power"):
        breaks()
    assert out.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_clip_replaces_an_older_one(tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    out.write_bytes(b"older")
    with VideoWriter(out, H, W, 16) as writer:
        writer.write(flat_frames())
    assert len(read_back(out)[1]) == 5


def picture_bytes(kind: str, size: tuple[int, int] = (W, H), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(picture_bytes("PNG"))
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert torch.equal(read_picture(path, H, W), pixels.float() / 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(W, H), (2 * W, 2 * H), (300, 40), (11, 97), (1, 1)])
def test_any_picture_fits(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    path = tmp_path / "x.tiff"
    path.write_bytes(picture_bytes("TIFF", size, mode))
    x = read_picture(path, H, W)
    assert x.shape == (3, H, W)
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() <= 1


def test_a_picture_is_scaled_to_cover_and_cropped_in_the_middle(tmp_path: Path) -> None:
    """A wide picture, red left, green in the middle, blue right: the middle is kept, undistorted."""
    pixels = np.zeros((2 * H, 8 * H, 3), np.uint8)
    pixels[:, : 2 * H, 0] = pixels[:, 2 * H : 6 * H, 1] = pixels[:, 6 * H :, 2] = 255
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    x = read_picture(path, H, W)
    assert x[1, :, 3:-3].min() > 0.99
    assert x[0, :, 3:-3].max() < 0.01
    assert x[2, :, 3:-3].max() < 0.01


@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP"]), st.integers(0, 4000), st.binary(max_size=40), st.booleans())
def test_a_damaged_picture_is_read_or_refused(kind: str, at: int, noise: bytes, cut: bool) -> None:
    """Never another error than the one the caller prints."""
    data = picture_bytes(kind, (24, 16))
    data = data[:at] if cut else data[:at] + noise + data[at + len(noise) :]

    class File(io.BytesIO):
        """What Image.open takes in place of a path."""

        def __str__(self) -> str:
            return "damaged"

    refusal, shape = "", None
    try:
        shape = read_picture(File(data), H, W).shape
    except ValueError as error:
        refusal = str(error)
    assert shape == (3, H, W) or refusal.startswith("image damaged: not a readable picture")


def test_a_picture_too_large_to_open_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(picture_bytes("PNG"))
    for limit in (W * H - 1, 100):  # Pillow only warns up to twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=rf"x\.png: not a readable picture: it has more than {limit:,} pixels"):
            read_picture(path, H, W)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", W * H)
    assert read_picture(path, H, W).shape == (3, H, W)


@pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1)])
def test_an_extreme_aspect_costs_no_memory(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled before it is cropped, this would be 720 x 28,800,000 pixels."""
    path, made = tmp_path / "x.png", []
    path.write_bytes(picture_bytes("PNG", size))
    whole = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *args: object, **settings: object) -> Image.Image:
        made.append(size)
        return whole(self, size, *args, **settings)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert read_picture(path, 720, 1280).shape == (3, 720, 1280)
    assert max(w * h for w, h in made) <= 720 * 1280


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_was(tmp_path: Path, orientation: int) -> None:
    """The file's red corner goes where EXIF says that row 0 and column 0 are."""
    pixels = np.full((H, H, 3), 200, np.uint8)
    pixels[: H // 2, : H // 2] = (200, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path, exif=exif)
    x = read_picture(path, H, H)
    corners = {(row, column): x[1, row, column] == 0 for row in (0, -1) for column in (0, -1)}
    expected = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert [place for place, red in corners.items() if red] == [expected[orientation]]


def test_a_turned_picture_is_cropped_after_it_is_turned(tmp_path: Path) -> None:
    """A tall file that is shown wide fills a wide frame, uncropped."""
    pixels = np.random.default_rng(0).integers(0, 255, (W, H, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path, exif=exif)
    turned = torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1)
    assert torch.equal(read_picture(path, H, W), turned.float() / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_grey(tmp_path: Path, mode: str) -> None:
    """Not whatever colour lies under it, here black; what covers half is halfway."""
    pixels = np.zeros((H, W, 4), np.uint8)
    pixels[:, : W // 2] = 255
    if mode in ("RGBA", "LA"):
        pixels[: H // 2, : W // 2, 3] = 128
    image = Image.fromarray(pixels)
    path = tmp_path / ("x.gif" if mode == "P" else "x.png")
    image.save(path) if mode == "P" else image.convert(mode).save(path)
    x = read_picture(path, H, W) * 255
    assert x[:, :, W // 2 + 1 :].sub(128).abs().max() <= 1
    assert x[:, H // 2 + 1 :, : W // 2 - 1].min() >= 254
    if mode in ("RGBA", "LA"):
        assert x[:, : H // 2 - 1, : W // 2 - 1].sub(192).abs().max() <= 1


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """Both clips are whole while they are made, the second to end has the name, and one that fails takes nothing
    from the other."""
    out = tmp_path / "clip.mp4"
    with VideoWriter(out, H, W, 16) as one:
        one.write(flat_frames()[:2])
        with VideoWriter(out, H, W, 16) as two:
            two.write(flat_frames())
        assert len(read_back(out)[1]) == 5
        with pytest.raises(ValueError), VideoWriter(out, H, W, 16) as three:
            three.write(flat_frames()[:, :, :, :2])  # no picture
        one.write(flat_frames()[2:4])
    assert len(read_back(out)[1]) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_places_for_a_clip(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "clip.mp4")
    assert not list((tmp_path / "a" / "b").iterdir()), "looking leaves a file behind"
    older = tmp_path / "clip.mp4"
    older.write_bytes(b"older")
    check_writable(older)
    assert older.read_bytes() == b"older"


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "clip.mp4", "a file can't be made there"),
        (tmp_path / "file" / "deeper" / "clip.mp4", "a file can't be made there"),
        (tmp_path / ("x" * 400 + ".mp4"), "too long"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            check_writable(path)
        assert str(error.value).startswith("output ")


def test_a_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system says it; tests may run as root, whom no permission stops."""

    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hhattn.video.io.tempfile.NamedTemporaryFile", refused)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(tmp_path / "clip.mp4")
