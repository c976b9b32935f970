"""Words (and a picture) -> video, chunk by chunk: path -> denoise -> commit -> decode -> hand over -> forget.

Memory does not depend on the clip's length: the model keeps its :class:`~hhattn.video.model.Memory`, the decoder two
feature maps, the prior a hundred seconds of knots, and pixels leave as soon as they are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import SPACE, TIME, Codec, DecoderState
from .model import Memory, VideoDiT
from .presets import SIZES, Size
from .prior import CONTEXT, KNOT_SECONDS, MotionPrior, Sampling, interpolate
from .reader import Reader
from .sampler import START, sample_chunk
from .text import Prompt, parse
from .weights import load
from .world.motion import CAMERA_PERIOD

DEMO_PROMPT = "a red balloon gliding over a meadow, panning camera"


@dataclass(frozen=True)
class Request:
    """What to generate. Raises ValueError for what can't be done, before any work starts."""

    prompt: str = DEMO_PROMPT
    seconds: float = 60.0
    size: str = "720x1280"
    fps: float = 16.0
    seed: int = 0
    steps: int = 1
    guidance: float = 1.0
    noise: float = 0.3
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 86_400:
            raise ValueError(f"seconds={self.seconds}; accepted: a number above 0, up to 86400 (a day)")
        if self.size not in SIZES:
            raise ValueError(f"size={self.size!r}; accepted: {', '.join(SIZES)}")
        if not 8 <= self.fps <= 32:
            raise ValueError(f"fps={self.fps}; accepted: 8 to 32 (the model was trained at 16)")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed={self.seed}; accepted: 0 to {2**40 - 1}")
        if not 1 <= self.steps <= 100:
            raise ValueError(f"steps={self.steps}; accepted: 1 to 100")
        if not 0 <= self.guidance <= 20:
            raise ValueError(f"guidance={self.guidance}; accepted: 0 to 20 (1 turns it off)")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise={self.noise}; accepted: 0 (the mean picture) to 1 (as trained)")

    @property
    def frames(self) -> int:
        return max(1, round(self.seconds * self.fps))


@dataclass
class Chunk:
    """One chunk's frames, uint8 ``[n, H, W, 3]``, with what they were made from."""

    index: int
    frames: Tensor
    latents: Tensor  # [1, T, C, h, w], on the pipeline's device
    poses: Tensor  # [T, 4, 4]: x, y, angle, camera of each of the latent frames' pictures
    seconds: dict[str, float]


class Pipeline:
    """The bundled models, ready to generate. ``Pipeline()`` loads the weights that come with the package.

    ``device`` is where latents and pictures are made. The motion prior stays on the CPU, where its few small steps are
    quickest, and noise is drawn there, so that it is the same everywhere. Run on CPUs only so far. Raises ValueError
    for a device that isn't here.
    """

    def __init__(self, folder: Path | str | None = None, device: str | torch.device = "cpu"):
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"device={str(device)!r}; accepted: a device that torch has here ({e})") from None
        self.codec, self.dit, self.prior, self.reader = Codec(), VideoDiT(), MotionPrior(), Reader()
        load(
            {"codec": self.codec, "dit": self.dit, "prior": self.prior, "reader": self.reader},
            None if folder is None else Path(folder),
        )
        for model in (self.codec, self.dit, self.reader):
            model.to(self.device)

    def understand(self, request: Request, picture: Tensor | None = None) -> Prompt:
        """The prompt's words; with a picture, what the prompt leaves open is read off the picture.

        Raises TypeError for what is no Request, PromptError, and ValueError for a picture that :meth:`stream` doesn't
        take.
        """
        if not isinstance(request, Request):
            raise TypeError(f'request must be a Request, got {type(request).__name__}: Request("{DEMO_PROMPT}")')
        if picture is None:
            return parse(request.prompt, request.seed)
        check_picture(picture, SIZES[request.size])
        seen = self.reader.read(self._encode(picture, SIZES[request.size])[0])
        return parse(request.prompt or " ".join(seen.words.values()), request.seed, seen.words)

    def _encode(self, picture: Tensor, size: Size) -> Tensor:
        margin = size.margin
        padded = F.pad(picture[None].to(self.device), (0, 0, margin, margin), mode="replicate")
        return self.codec.encode(padded[None])[0]

    @torch.no_grad()
    def stream(
        self, request: Request, picture: Tensor | None = None, wanted: Callable[[int], bool] = lambda index: True
    ) -> Iterator[Chunk]:
        """Generate chunk after chunk. ``picture [3, H, W]`` (float32 in [0, 1], of the size's native height and width)
        becomes frame 0. Chunks whose index is not ``wanted`` are generated but not decoded: they come without frames.

        Raises PromptError for words, and ValueError for a picture, that can't be taken, before anything is generated.
        """
        return self._chunks(request, self.understand(request, picture).ids()[None], picture, wanted)

    @torch.no_grad()
    def _chunks(
        self, request: Request, words: Tensor, picture: Tensor | None, wanted: Callable[[int], bool]
    ) -> Iterator[Chunk]:
        size = SIZES[request.size]
        first = None if picture is None else self._encode(picture, size)
        knots = torch.zeros(1, 0, 4)
        if first is not None:
            knots = self._settle(first, words, size).view(1, 1, 4)
            knots[..., 0] /= size.aspect / (16 / 9)  # the prior's paths are those of a 16:9 picture
        memory: Memory | None = None
        decoder: DecoderState | None = None
        chance = torch.Generator().manual_seed(request.seed)
        done, index, dropped, count = 0, 0, 0, self.dit.config.chunk  # no chunk of another length was trained
        while done < request.frames:
            clock = Stopwatch()
            times = self._times(index * count, count, request.fps)
            past = dropped * KNOT_SECONDS
            knots = self._extend(knots, float(times[-1, -1]) - past, words, request.sampling, chance)
            poses = interpolate(knots, times.flatten() - past).view(1, count, TIME, 4)
            poses[..., 0] *= size.aspect / (16 / 9)
            clock.lap("motion")
            latents, memory = self._denoise(
                request, words, times[None], poses, memory, index, size, first if index == 0 else None
            )
            clock.lap("denoise")
            made = min(count * TIME - (TIME - 1 if index == 0 else 0), request.frames - done)
            if wanted(index):
                frames, decoder = self._decode(latents, decoder, size)
            else:
                frames, decoder = torch.empty(0, *size.output, 3, dtype=torch.uint8), self.codec.skip(latents)
            clock.lap("decode")
            yield Chunk(index, frames[:made], latents, poses[0], clock.laps)
            done, index = done + made, index + 1
            if knots.shape[1] > 4 * CONTEXT:  # the prior looks back 2·CONTEXT knots; older ones are forgotten
                knots, dropped = knots[:, CONTEXT:], dropped + CONTEXT

    def _settle(self, first: Tensor, words: Tensor, size: Size) -> Tensor:
        """The pose ``[4]`` of a picture: the subject's place as read, and the camera's place under which the
        transformer itself would have drawn the picture most alike, searched over the whole panorama and then narrowed
        down."""
        subject, step = self.reader.read(first[0], size.margin).pose, CAMERA_PERIOD / 48
        cameras = torch.arange(48) * step
        for _ in range(5):
            poses = torch.cat([subject.expand(len(cameras), 3), cameras[:, None]], 1)
            best = poses[int(torch.cat([self._mismatch(first, words, p, size) for p in poses.split(8)]).argmin())]
            step /= 2
            cameras = best[3] + step * torch.tensor([-1.0, 0.0, 1.0])
        return best

    def _mismatch(self, first: Tensor, words: Tensor, poses: Tensor, size: Size) -> Tensor:
        """Mean square error ``[n]``, in pixels, between a picture's latents and those drawn in one step at
        ``poses [n, 4]``."""
        n, half = len(poses), (size.grid[0], size.grid[1] // 2)  # half the columns tell enough
        seen, dev = first[..., : half[1]], self.device
        still = poses.to(dev).view(n, 1, 1, 4).expand(-1, -1, TIME, -1)
        start, origin = torch.zeros(n, 1, TIME, device=dev), torch.zeros(n, 2, device=dev)
        cond = self.dit.condition(words.to(dev).expand(n, -1), start, still, origin, half, size.margin)
        level = torch.full((n, 1), START, device=dev)
        drawn, _ = self.dit(torch.zeros_like(seen).expand(n, -1, -1, -1, -1), level, cond, (1,))
        return ((drawn - seen) * self.codec.spread.view(-1, 1, 1)).square().mean((1, 2, 3, 4))

    @staticmethod
    def _times(start: int, count: int, fps: float) -> Tensor:
        """Seconds ``[count, 4]`` of the pictures in latent frames ``start``…; latent frame 0 is one picture, four
        times."""
        k = torch.arange(start * TIME, (start + count) * TIME) - (TIME - 1)
        return (k.clamp(min=0) / fps).view(count, TIME)

    def _extend(self, knots: Tensor, until: float, words: Tensor, sampling: Sampling, g: torch.Generator) -> Tensor:
        """Knots past ``until`` seconds, and one more, which the spline needs."""
        need = int(until / KNOT_SECONDS) + 3 - knots.shape[1]
        return self.prior.extend(knots, words[:, [2, 4]], max(0, need), sampling, g)

    def _denoise(
        self,
        request: Request,
        words: Tensor,
        times: Tensor,
        poses: Tensor,
        memory: Memory | None,
        index: int,
        size: Size,
        first: Tensor | None,
    ) -> tuple[Tensor, Memory]:
        words, times, poses = words.to(self.device), times.to(self.device), poses.to(self.device)
        grid, origin = size.grid, torch.zeros(1, 2, device=self.device)
        cond = self.dit.condition(words, times, poses, origin, grid, size.margin)
        empty = None
        if request.guidance != 1:
            empty = self.dit.condition(self.dit.no_words(1), times, poses, origin, grid, size.margin)
        # a chunk's noise depends on its index alone; its frames share it, so that what is left of it is steady
        g = torch.Generator().manual_seed((request.seed << 20) + index)
        noise = torch.randn(1, 1, self.dit.config.channels, *grid, generator=g, device="cpu") * request.noise
        noise = noise.to(self.device).expand(-1, times.shape[1], -1, -1, -1)
        return sample_chunk(
            self.dit, cond, empty, noise, memory, steps=request.steps, guidance=request.guidance, first=first
        )

    def _decode(self, latents: Tensor, state: DecoderState | None, size: Size) -> tuple[Tensor, DecoderState]:
        """Latents -> uint8 pictures of the output's size, one latent frame at a time to keep the peak low."""
        out = []
        for z in latents.split(1, dim=1):
            frames, state = self.codec.decode(z, state)
            x = frames[0, :, :, size.margin : size.margin + size.native[0], : size.native[1]]
            if size.output != size.native:
                x = F.interpolate(x.clamp(0, 1), size=size.output, mode="area")
            out.append(to_bytes(x))
        assert state is not None
        return torch.cat(out), state


def to_bytes(frames: Tensor) -> Tensor:
    """``[T, 3, H, W]`` in [0, 1] (what is beyond is cut off) -> ``[T, H, W, 3]`` uint8 on the CPU."""
    t, channels, height, width = frames.shape
    out = torch.empty(t, height, width, channels, dtype=torch.uint8, device="cpu")
    for frame in range(t):
        for channel in range(channels):  # plane by plane, since these stay in the cache: seven times as fast
            out[frame, :, :, channel] = (frames[frame, channel] * 255).round_().clamp_(0, 255)
    return out


def check_picture(picture: Tensor, size: Size) -> None:
    """Raises ValueError unless ``picture`` is float32 ``[3, H, W]`` in [0, 1], H and W as ``size`` is drawn."""
    shape = (3, *size.native)
    if tuple(picture.shape) != shape:
        raise ValueError(f"picture has shape {tuple(picture.shape)}; accepted: {shape}, the size that is drawn")
    if picture.dtype != torch.float32:
        raise ValueError(f"picture has dtype {picture.dtype}; accepted: torch.float32 in [0, 1]")
    low, high = picture.aminmax()
    if not (low >= 0 and high <= 1):  # nan is neither
        raise ValueError(f"picture has values from {low:g} to {high:g}; accepted: 0 to 1")


class Stopwatch:
    """Seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now


__all__ = ["DEMO_PROMPT", "SPACE", "Chunk", "Pipeline", "Request"]
