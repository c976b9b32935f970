"""A SANA-Video pipeline of diffusers, small and random, as a folder on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, SanaVideoPipeline, SanaVideoTransformer3DModel
from model_zoo import randomize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

HEIGHT, WIDTH = 32, 64  # 4x8 latents, 2x4 patches


def make() -> SanaVideoPipeline:
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<unk>", "a", "red", "blue", "balloon", "boat"])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", model_max_length=64
    )
    config = Gemma2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        mlp_ratio=2.0, patch_size=(1, 2, 2), rope_max_seq_len=64,
    )  # fmt: skip
    pipeline = SanaVideoPipeline(
        tokenizer, Gemma2Model(config).eval(), vae.eval(), randomize(transformer), FlowMatchEulerDiscreteScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(folder: Path) -> Path:
    make().save_pretrained(folder)
    return folder
