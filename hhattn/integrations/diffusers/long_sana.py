"""Long clips from a SANA-Video pipeline of diffusers: chunk by chunk, at constant memory.

A chunk of latent frames is denoised while it attends itself and the memory of all chunks before; one more pass over the
clean chunk writes it into the memory; its pictures are decoded and handed over. So nothing grows with the clip, and a
clip can stop after any chunk and go on later, to the same bits.

Source: LongSANA in SANA-Video (arXiv:2509.24695); the pipeline folders are diffusers' ``SanaVideoPipeline``'s.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hhattn.integrations.diffusers._sana_stream import Memory, Stream

FEW_STEPS = (1000.0, 960.0, 889.0, 727.0)  # LongSANA's distilled sampler
FIXED = ("height", "width", "chunk", "steps", "guidance", "seed")  # what a clip that goes on can't change


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(item: tuple[Any, Any]) -> bool:
    return _is_whole(item[0]) and item[0] >= 0 and isinstance(item[1], str)


@dataclass(frozen=True)
class LongRequest:
    """What to generate. Raises ValueError for what can't be done, before any work starts.

    prompt: one for the whole clip, or {first chunk: prompt}, with chunk 0 among them: prompts may switch.
    frames: pictures. height, width: of the pictures; multiples of the VAE's and the patches' sizes.
    chunk: latent frames a chunk (LongSANA: 10).
    steps: noise levels of the distilled sampler, 1000 ... 0, descending; or a number of steps of the pipeline's own
        scheduler, for a model that isn't distilled.
    guidance: classifier-free guidance; 1 is off, above 1 doubles the cost.
    image: [3, height, width], floats in [-1, 1]: becomes the first picture.
    """

    prompt: str | dict[int, str]
    frames: int = 81
    height: int = 480
    width: int = 832
    chunk: int = 10
    steps: int | Sequence[float] = FEW_STEPS
    guidance: float = 1.0
    negative_prompt: str = ""
    seed: int = 0
    image: Tensor | None = None

    def __post_init__(self) -> None:
        prompts = {0: self.prompt} if isinstance(self.prompt, str) else self.prompt
        if not isinstance(prompts, dict) or 0 not in prompts or not all(map(_is_prompt, prompts.items())):
            raise ValueError(f"prompt={self.prompt!r}: accepted are words, or {{chunk: words}} with chunk 0 among them")
        for name in ("frames", "height", "width", "chunk"):
            if not _is_whole(value := getattr(self, name)) or value < 1:
                raise ValueError(f"{name}={value!r}: accepted is a whole number of 1 or more")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**40:
            raise ValueError(f"seed={self.seed!r}: accepted is 0 to {2**40 - 1}")
        self._check_steps()
        if self.guidance < 1:
            raise ValueError(f"guidance={self.guidance}: accepted is 1 (off) or more")
        if self.image is not None:
            self._check_image(self.image)

    def _check_steps(self) -> None:
        if _is_whole(self.steps):
            if self.steps < 1:
                raise ValueError(f"steps={self.steps}: accepted is 1 or more")
            return
        levels = list(self.steps) if isinstance(self.steps, Sequence) else []
        if not levels or levels[0] > 1000 or levels[-1] <= 0 or sorted(levels, reverse=True) != levels:
            raise ValueError(f"steps={self.steps}: accepted are levels above 0 up to 1000, descending, or a number")

    def _check_image(self, image: Tensor) -> None:
        if tuple(image.shape) != (3, self.height, self.width):
            raise ValueError(f"image has shape {tuple(image.shape)}; accepted is (3, {self.height}, {self.width})")
        if not image.is_floating_point() or not image.abs().max() <= 1:
            came = f"{image.dtype}, {image.min().item():g} to {image.max().item():g}"
            raise ValueError(f"image is {came}; accepted are floats from -1 to 1")

    def fixed(self) -> dict[str, Any]:
        """What has to stay the same when a clip goes on; prompts and length may change."""
        return {name: v if _is_whole(v := getattr(self, name)) or name == "guidance" else list(v) for name in FIXED}

    def prompt_of(self, chunk: int) -> str:
        """The prompt that holds for a chunk: the last given before or at it."""
        prompts = {0: self.prompt} if isinstance(self.prompt, str) else self.prompt
        return prompts[max(i for i in prompts if i <= chunk)]


@dataclass
class LongChunk:
    """One chunk's pictures, uint8 [n, H, W, 3], and its clean latents [1, C, T, h, w]."""

    index: int
    frames: Tensor
    latents: Tensor


@dataclass
class _Progress:
    """Where a clip stands between two chunks, and what the model remembers of it. ``request``: what is fixed of it."""

    memory: list[Memory]
    request: dict[str, Any] = field(default_factory=dict)
    position: int = 0
    index: int = 0
    done: int = 0  # pictures
    decoder: list[Any] | None = None


@dataclass
class LongSana:
    """``LongSana(pipeline)`` on a ``SanaVideoPipeline`` or ``SanaImageToVideoPipeline``, or :meth:`from_pretrained`.

    :meth:`stream` generates; between two chunks :meth:`state` is all that is needed to go on in another process.
    Several streams may be open at once, each with a memory of its own: chunks of one and another in turn, in one
    thread. Between chunks the pipeline works as ever. :meth:`close`, leaving a ``with`` block, and being forgotten give
    its transformer back as it was.
    """

    pipeline: Any
    _stream: Stream = field(init=False, repr=False)
    _at: _Progress = field(init=False, repr=False)  # of the clip whose chunk came last

    def __post_init__(self) -> None:
        for name in ("transformer", "vae", "scheduler", "text_encoder"):
            if getattr(self.pipeline, name, None) is None:
                raise ValueError(
                    f"pipeline is a {type(self.pipeline).__name__} without a {name}; accepted: SANA-Video's"
                )
        if type(self.pipeline.transformer).__name__ != "SanaVideoTransformer3DModel":
            raise ValueError(f"its transformer is a {type(self.pipeline.transformer).__name__}; accepted: SANA-Video's")
        self._stream = Stream(self.pipeline.transformer)
        self._at = _Progress(self._stream.memory)
        weakref.finalize(self, self._stream.undo)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> LongSana:
        """Load a pipeline's folder; ``settings`` are those of diffusers' ``from_pretrained``."""
        from diffusers import DiffusionPipeline

        return cls(DiffusionPipeline.from_pretrained(folder, **settings))

    def close(self) -> None:
        """Give the pipeline's transformer back as it was."""
        self._stream.undo()

    def __enter__(self) -> LongSana:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes that are remembered of the past of the stream whose chunk came last, whatever its length."""
        return self._stream.nbytes

    def state(self) -> dict[str, Any]:
        """Everything of the stream whose chunk came last, for ``torch.save`` and ``stream(request, state)``."""
        at = self._at
        kept = {"index": at.index, "done": at.done, "decoder": at.decoder, "request": at.request}
        return {"stream": self._stream.state(), "at": kept}

    def stream(self, request: LongRequest, state: dict[str, Any] | None = None) -> Iterator[LongChunk]:
        """Generate chunk after chunk; with ``state``, those that are still to come of the same request, whose prompts
        and length may have changed.

        Where a chunk fails, the state is that after the chunk before.

        Raises ValueError for a size that the models don't take, or another clip's ``state``, before anything is
        generated.
        """
        self._check(request)
        at = {"request": request.fixed()} if state is None else state["at"]
        for name, value in request.fixed().items():
            if at["request"][name] != value:
                raise ValueError(f"{name}={value}: state is of a clip with {name}={at['request'][name]}")
        empty = {"memory": [(None, None)] * len(self._stream.memory), "position": 0}
        self._stream.restore(empty if state is None else state["stream"])
        self._at = _Progress(self._stream.memory, position=self._stream.position, **at)
        return self._chunks(request, self._at)

    def latent_frames(self, request: LongRequest) -> int:
        """Latent frames of a clip: the first is one picture, every other several."""
        return -(-(request.frames - 1) // int(self.pipeline.vae_scale_factor_temporal)) + 1

    def _check(self, request: LongRequest) -> None:
        patch = self.pipeline.transformer.config.patch_size
        if patch[0] != 1:
            raise ValueError(f"the transformer's patches are {patch[0]} latent frames long; accepted is 1")
        for name, p in (("height", patch[1]), ("width", patch[2])):
            unit = int(self.pipeline.vae_scale_factor_spatial) * p
            if getattr(request, name) % unit:
                raise ValueError(f"{name}={getattr(request, name)}: accepted are multiples of {unit}")

    @torch.no_grad()  # it runs when it is asked for a chunk, so a caller's own setting wouldn't reach it
    def _chunks(self, request: LongRequest, at: _Progress) -> Iterator[LongChunk]:
        total, said = self.latent_frames(request), None
        words: tuple[Tensor, Tensor] | None = None
        while at.index * request.chunk < total:
            if words is None or request.prompt_of(at.index) != said:
                said = request.prompt_of(at.index)
                words = self._words(said, request)
            done, at = at, replace(at, memory=[replace(layer) for layer in at.memory])
            try:
                self._enter(at)
                chunk = self._next(request, words, min(request.chunk, total - at.index * request.chunk))
            except BaseException:
                self._enter(done)  # what was written of this chunk is forgotten
                raise
            yield chunk

    def _enter(self, at: _Progress) -> None:
        self._at, self._stream.memory, self._stream.position = at, at.memory, at.position

    def _next(self, request: LongRequest, words: tuple[Tensor, Tensor], count: int) -> LongChunk:
        """The chunk at hand, ``count`` latent frames; written into the memory."""
        at = self._at
        with self._stream.running():
            self._stream.make_room(count)
            latents = self._denoise(request, words, count)
            with self._stream.writing():
                self._predict(latents, torch.zeros(1), words, request, None)
        frames = self._decode(latents)[: request.frames - at.done]
        at.done += len(frames)
        at.index += 1
        at.position = self._stream.position
        return LongChunk(at.index - 1, frames, latents)

    def _words(self, prompt: str, request: LongRequest) -> tuple[Tensor, Tensor]:
        """Embeddings and mask, those of the negative prompt first where there is guidance."""
        guided = request.guidance > 1
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        embeds, mask, negative, negative_mask = self.pipeline.encode_prompt(
            prompt, guided, request.negative_prompt, device=self._device, complex_human_instruction=instruction
        )
        if not guided:
            return embeds, mask
        return torch.cat([negative, embeds]), torch.cat([negative_mask, mask])

    @property
    def _device(self) -> torch.device:
        return torch.device(self.pipeline._execution_device)

    def noise(self, request: LongRequest, index: int, count: int) -> tuple[Tensor, torch.Generator]:
        """The noise [1, C, count, h, w] that chunk ``index`` begins with, and the generator that drew it. Both depend
        on the seed and the index alone."""
        generator = torch.Generator().manual_seed((request.seed << 20) + index)
        scale, channels = int(self.pipeline.vae_scale_factor_spatial), self.pipeline.transformer.config.in_channels
        shape = (1, channels, count, request.height // scale, request.width // scale)
        return torch.randn(shape, generator=generator).to(self._device), generator

    def _denoise(self, request: LongRequest, words: tuple[Tensor, Tensor], count: int) -> Tensor:
        """Clean latents [1, C, count, h, w] of the next chunk."""
        latents, generator = self.noise(request, self._at.index, count)
        first = None
        if request.image is not None and self._at.index == 0:
            first = self._encode(request.image)
            latents = torch.cat([first, latents[:, :, 1:]], dim=2)
        if isinstance(request.steps, int):
            return self._by_scheduler(request, words, latents, first)
        levels = [float(t) for t in request.steps]
        for t, after in zip(levels, [*levels[1:], 0.0], strict=True):
            velocity = self._predict(latents, torch.tensor([t]), words, request, first)
            clean = latents - t / 1000 * velocity
            if after:
                noise = torch.randn(clean.shape, generator=generator).to(clean)
                clean = (1 - after / 1000) * clean + after / 1000 * noise
            latents = clean if first is None else torch.cat([first, clean[:, :, 1:]], dim=2)
        return latents

    def _by_scheduler(
        self, request: LongRequest, words: tuple[Tensor, Tensor], latents: Tensor, first: Tensor | None
    ) -> Tensor:
        scheduler = copy.deepcopy(self.pipeline.scheduler)  # it counts steps
        scheduler.set_timesteps(request.steps, device=self._device)
        for t in scheduler.timesteps:
            velocity = self._predict(latents, t.reshape(1), words, request, first)
            if first is None:
                latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
            elif latents.shape[2] > 1:
                rest = scheduler.step(velocity[:, :, 1:], t, latents[:, :, 1:], return_dict=False)[0]
                latents = torch.cat([first, rest], dim=2)
        return latents

    def _predict(
        self, latents: Tensor, t: Tensor, words: tuple[Tensor, Tensor], request: LongRequest, first: Tensor | None
    ) -> Tensor:
        """The model's velocity for a chunk at noise level t, guided. With ``first`` its first latent frame is clean."""
        model, guided = self.pipeline.transformer, request.guidance > 1
        x = torch.cat([latents] * 2) if guided else latents
        t = t.to(self._device).expand(len(x))
        if first is not None:
            frames, height, width = (n // p for n, p in zip(x.shape[2:], model.config.patch_size, strict=True))
            t = t.view(-1, 1, 1, 1, 1).repeat(1, 1, frames, height, width)
            t[:, :, 0] = 0
        embeds, mask = words
        out = model(
            x.to(model.dtype),
            encoder_hidden_states=embeds.to(model.dtype),
            encoder_attention_mask=mask,
            timestep=t,
            return_dict=False,
        )[0].float()
        if guided:
            without, given = out.chunk(2)
            out = without + request.guidance * (given - without)
        channels = model.config.in_channels
        return out[:, :channels] if model.config.out_channels // 2 == channels else out

    # ---- pictures ----

    def _scale(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and spread of the VAE's latents, [1, C, 1, 1, 1]."""
        vae, channels = self.pipeline.vae, self.pipeline.transformer.config.in_channels
        known = {**dict(vae.named_buffers()), **{name: x for name, x in vae.config.items() if x is not None}}
        parts = known.get("latents_mean", torch.zeros(channels)), known.get("latents_std", torch.ones(channels))
        mean, spread = (torch.as_tensor(x).view(1, -1, 1, 1, 1).to(self._device, dtype) for x in parts)
        return mean, spread

    def _encode(self, image: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, spread = self._scale(vae.dtype)
        latents = vae.encode(image[None, :, None].to(self._device, vae.dtype)).latent_dist.mode()
        return ((latents - mean) / spread).float()

    def _decode(self, latents: Tensor) -> Tensor:
        """uint8 pictures [n, H, W, 3]. Wan's VAE looks back only, so its features of the last frames are carried from
        chunk to chunk and the result is that of the whole clip. For another the last latent frame is: a chunk is
        decoded behind it, whose one picture was there already."""
        vae = self.pipeline.vae
        mean, spread = self._scale(vae.dtype)
        z = latents.to(vae.dtype) * spread + mean
        if type(vae).__name__ == "AutoencoderKLWan" and not vae.use_tiling:
            video = self._decode_on(vae, z)
        else:
            before = [] if self._at.decoder is None else self._at.decoder
            video = vae.decode(torch.cat([*before, z], dim=2), return_dict=False)[0][:, :, len(before) :]
            self._at.decoder = [z[:, :, -1:].clone()]
        return ((video[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()

    def _decode_on(self, vae: Any, z: Tensor) -> Tensor:
        if hook := getattr(getattr(vae, "_hf_hook", None), "pre_forward", None):
            hook(vae)  # offloaded, it comes back when it is decoded with, as by its own decode()
        vae.clear_cache()
        began = self._at.decoder is not None
        if self._at.decoder is not None:
            vae._feat_map = list(self._at.decoder)  # the decoder writes into it, and state() may hold ours
        z, out = vae.post_quant_conv(z), []
        for i in range(z.shape[2]):
            vae._conv_idx = [0]
            first = {} if began or i else {"first_chunk": True}
            out.append(vae.decoder(z[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first))
        self._at.decoder = list(vae._feat_map)
        vae.clear_cache()
        video = torch.cat(out, dim=2)
        if vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            video = unpatchify(video, patch_size=vae.config.patch_size)
        return video.clamp(-1, 1)
