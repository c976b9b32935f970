"""The bundled weights: one fp16 safetensors file a model, beside this module."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FOLDER = Path(__file__).parent


def load(models: dict[str, nn.Module], folder: Path | None = None) -> None:
    """Fill each model from ``folder/NAME.safetensors`` (default: the package's own) and set it to eval.

    Raises FileNotFoundError naming the file that is missing, ValueError if a file doesn't fit its model.
    """
    for name, model in models.items():
        path = (folder or FOLDER) / f"{name}.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"weights {path} not found; they come with the package, or from `python -m hhattn.video.train`"
            )
        try:
            model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        except RuntimeError as e:
            raise ValueError(
                f"weights {path} don't fit this version of the model: {str(e).splitlines()[-1].strip()}"
            ) from None
        model.eval().requires_grad_(False)


def store(model: nn.Module, name: str, folder: Path | None = None, **notes: str) -> Path:
    """Write a model's weights as fp16, with ``notes`` (strings) in the header; an older file stays whole until then."""
    path = (folder or FOLDER) / f"{name}.safetensors"
    part = path.with_suffix(".part")
    save_file({k: v.to(torch.float16).contiguous() for k, v in model.state_dict().items()}, part, metadata=notes)
    os.replace(part, path)
    return path
