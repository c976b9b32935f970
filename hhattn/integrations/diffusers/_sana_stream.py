"""A SANA-Video transformer that remembers: chunk after chunk of a clip, each attending itself and all before it.

What a layer remembers does not grow: the sums of its linear attention, and the last frame that its convolution over
time saw (LongSANA, arXiv:2509.24695). Both are written by one pass over a chunk's clean latents and read by all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

import hhattn
from hhattn.integrations.diffusers._blocks import Processor
from hhattn.integrations.diffusers._qk import heads, norm_rope, why_not_fused
from hhattn.integrations.swap import Swap


@dataclass
class Memory:
    """What one layer keeps of every chunk so far, None before the first.

    sums: of its attention, float32. frame: [B, C, 1, h·w], the last latent frame before its convolution over time.
    """

    sums: hhattn.LinearAttentionState | None = None
    frame: Tensor | None = None


class Stream:
    """Installs the memory in a SanaVideoTransformer3DModel; :meth:`undo` takes it out.

    Inside :meth:`running` the model's own forward runs a chunk: it attends the chunk and all that is remembered, at
    positions that go on from the last chunk's. Inside :meth:`writing` the chunk is added to the memory. Outside of both
    the model is what it was.

    Raises ValueError for a model whose layers are not SANA-Video's.
    """

    def __init__(self, model: Any) -> None:
        if any(isinstance(block.attn1.processor, _Attention) for block in model.transformer_blocks):
            raise ValueError("the transformer streams already; close() the LongSana that it belongs to first")
        self.model, self.handle = model, Swap()
        self.memory = [Memory() for _ in model.transformer_blocks]
        self.position = 0  # of the next chunk's first latent frame, counted from the origin
        self.active = self._writing = False
        self.limit = int(model.rope.max_seq_len)
        try:
            for i, block in enumerate(model.transformer_blocks):
                self._install(i, block)
            own = model.rope.forward
            self.handle.set_forward("rope", model.rope, lambda rope, x: self._rope(rope, x) if self.active else own(x))
        except BaseException:
            self.handle.undo()
            raise

    def undo(self) -> None:
        """Give the model back as it was."""
        self.handle.undo()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the model is called with inside is the next chunk."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What the model sees inside is remembered, and the position moves on behind it."""
        self._writing, self._frames = True, 0
        try:
            yield
            self.position += self._frames
        finally:
            self._writing = False

    def make_room(self, frames: int) -> None:
        """Count positions from here on, where ``frames`` more would leave the model's table: exact, since rotations of
        the same plane compose."""
        if self.position + frames <= self.limit:
            return
        for memory in self.memory:
            if memory.sums is not None:
                at, device = (self.position, 0, 0), memory.sums.kv.device
                memory.sums = memory.sums.rebase(*hhattn.rope_3d((1, 1, 1), self._head_dim, offset=at, device=device))
        self.position = 0

    def state(self) -> dict[str, Any]:
        """The memory, as tensors and a number, for :meth:`restore`."""
        rows = [(None if m.sums is None else tuple(m.sums), m.frame) for m in self.memory]
        return {"memory": rows, "position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.position = state["position"]
        self.memory = [
            Memory(None if sums is None else hhattn.LinearAttentionState(*sums), frame)
            for sums, frame in state["memory"]
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        kept = [x for m in self.memory for x in (*(m.sums or ()), m.frame) if x is not None]
        return sum(x.nbytes for x in kept)

    @property
    def _head_dim(self) -> int:
        return int(self.model.config.attention_head_dim)

    def _install(self, i: int, block: Any) -> None:
        if why := why_not_fused(block.attn1):
            raise ValueError(f"transformer_blocks.{i}.attn1: {why}")
        if block.ff.residual_connection or block.ff.norm_type is not None:
            raise ValueError(f"transformer_blocks.{i}.ff: accepted is SANA-Video's, without a norm and a residual")
        attention = _Attention(self, i, block.attn1.processor)
        self.handle.set_processor(f"transformer_blocks.{i}.attn1", block.attn1, attention)
        own = block.ff.forward

        def forward(ff: Any, hidden_states: Tensor) -> Tensor:
            return self._ff(i, ff, hidden_states) if self.active else own(hidden_states)

        self.handle.set_forward(f"transformer_blocks.{i}.ff", block.ff, forward)

    def _rope(self, rope: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """diffusers' tables [1, N, 1, D] for the chunk's place in the clip."""
        frames, height, width = (n // p for n, p in zip(hidden_states.shape[2:], rope.patch_size, strict=True))
        self._frames = frames
        offset = (self.position, 0, 0)
        cos, sin = hhattn.rope_3d((frames, height, width), self._head_dim, offset=offset, device=hidden_states.device)
        return cos[None, :, None], sin[None, :, None]

    def _ff(self, i: int, ff: Any, x: Tensor) -> Tensor:
        """GLUMBTempConv of x [B, F, h, w, C], whose convolution over time begins with the remembered frame."""
        batch, frames, height, width, channels = x.shape
        y = ff.nonlinearity(ff.conv_inverted(x.flatten(0, 1).permute(0, 3, 1, 2)))
        y, gate = ff.conv_depth(y).chunk(2, dim=1)
        y = ff.conv_point(y * ff.nonlinearity(gate))
        y = y.view(batch, frames, channels, height * width).transpose(1, 2)
        before = self.memory[i].frame
        seen = y if before is None else torch.cat([before, y], dim=2)
        mixed = y + ff.conv_temp(seen)[:, :, -frames:]
        if self._writing:
            self.memory[i].frame = y[:, :, -1:].clone()
        return mixed.permute(0, 2, 3, 1).view(batch, frames, height, width, channels)


class _Attention(Processor):
    """SANA-Video's linear self-attention of a chunk, with what its layer remembers."""

    def __init__(self, stream: Stream, layer: int, own: Any) -> None:
        self.stream, self.layer, self.own = stream, layer, own

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, S, C], rotary_emb (cos, sin) [1, S, 1, D] -> [B, S, C]."""
        if not self.stream.active:
            return cast(Tensor, self.own(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb))
        if encoder_hidden_states is not None or attention_mask is not None or rotary_emb is None:
            raise ValueError("SANA-Video's self-attention takes rotary_emb and no mask or second sequence")
        q, k = norm_rope(attn, attn.to_q(hidden_states), attn.to_k(hidden_states), None, fuse=True)
        rope = (rotary_emb[0][0, :, 0], rotary_emb[1][0, :, 0])
        memory = self.stream.memory[self.layer]
        out: Any = hhattn.block_linear_attention(
            q,
            k,
            heads(attn, attn.to_v(hidden_states)),
            rope=rope,
            initial_state=memory.sums,
            output_final_state=self.stream._writing,
        )
        if self.stream._writing:
            out, memory.sums = out
        out = attn.to_out[0](cast(Tensor, out).flatten(2))
        return attn.to_out[1](out)
