"""What every training run shares: schedule, averaged weights, checkpoints, pausing, logging."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

WARMUP = 60  # steps
HOLD = 0.6  # share of the run at full learning rate before it falls


def save(path: Path, state: object) -> None:
    """Write beside, then rename: a killed run keeps the older file whole."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def run(
    name: str,
    out: Path,
    model: Model,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[Model, torch.Generator], Tensor],
    evaluate: Callable[[Model], dict[str, float]],
    *,
    minutes: float,
    seed: int = 0,
    every: float = 5.0,
    start_from: Path | None = None,
) -> Model:
    """Train ``model`` until ``minutes`` of wall time are spent and return its averaged weights.

    ``out/NAME.pt`` is written every ``every`` minutes and resumed from when it is there; ``start_from`` (a
    checkpoint, or shipped safetensors) gives the first weights of a new run. The run stands still while ``out/pause``
    exists. ``out/NAME.jsonl`` gets a line of figures each time.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.pt"
    average = copy.deepcopy(model).eval().requires_grad_(False)
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    step, elapsed = 0, 0.0
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for o, s in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(s)
        step, elapsed = state["step"], state["elapsed"]
    elif start_from:
        shipped = start_from.suffix == ".safetensors"
        model.load_state_dict(load_file(start_from) if shipped else torch.load(start_from)["average"])
        average.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed + 7919 * step)
    losses: list[float] = []
    report, last = elapsed + 60 * min(every, 1), time.monotonic()
    while elapsed < minutes * 60:
        while (out / "pause").exists():
            time.sleep(1)
            last = time.monotonic()
        _set_rates(optimizers, rates, step, elapsed / (minutes * 60))
        losses.append(_step(model, optimizers, loss_of, generator))
        step += 1
        keep = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        now = time.monotonic()
        elapsed, last = elapsed + now - last, now
        if elapsed >= report or elapsed >= minutes * 60:
            line = {
                "step": step,
                "minutes": round(elapsed / 60, 1),
                "loss": sum(losses) / len(losses),
                **evaluate(average),
            }
            _log(out / f"{name}.jsonl", line)
            optimizer_states = [o.state_dict() for o in optimizers]
            save(
                path,
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": optimizer_states,
                    "step": step,
                    "elapsed": elapsed,
                },
            )
            losses, report, last = [], elapsed + every * 60, time.monotonic()
    return average


def _set_rates(optimizers: Sequence[torch.optim.Optimizer], rates: list[list[float]], step: int, done: float) -> None:
    scale = min(1, (step + 1) / WARMUP) * (0.02 + 0.98 * min(1, (1 - done) / (1 - HOLD)))
    for o, base in zip(optimizers, rates, strict=True):
        for group, rate in zip(o.param_groups, base, strict=True):
            group["lr"] = rate * scale


def _step(
    model: Model,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_of: Callable[[Model, torch.Generator], Tensor],
    g: torch.Generator,
) -> float:
    loss = loss_of(model, g)
    for o in optimizers:
        o.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for o in optimizers:
        o.step()
    return float(loss.detach())


def _log(path: Path, line: dict[str, Any]) -> None:
    line = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
    with open(path, "a") as log:
        log.write(json.dumps(line) + "\n")
    print(line, flush=True)
