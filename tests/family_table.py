"""What `make test` says of the models: a table of families and of what the tests of tests/test_models.py proved."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.table import Table

# column of the table -> the test behind it; an id may name a part of it
COLUMNS = {
    "fp32 ≤ 2e-5, undo": "test_exact_swap_gives_the_same_and_undo_the_same_bits",
    "bf16": "test_bfloat16_is_no_worse_than_diffusers",
    "gradients": "test_gradients_are_the_same",
    "radial": "test_a_pattern_is_diffusers_own_attention_under_its_mask[radial-",
    "sliding tile": "test_a_pattern_is_diffusers_own_attention_under_its_mask[sliding_tile-",
    "plan": "test_a_plan_runs",
    "fullgraph": "test_attention_layers_compile_whole",
    "LoRA": "test_lora",
    "save, load": "test_save_and_load",
    "checkpointing": "test_gradient_checkpointing",
}
FILE = "test_models.py::"


def family_of(test: str, names: Iterable[str]) -> str | None:
    """The family that a test's id names: the longest name, for "LTX-2" is part of "LTX-2.3"."""
    found = re.search(r"\[(.*)\]", test)
    return max((name for name in names if found and name in found[1]), key=len, default=None)


def table(outcomes: dict[str, bool], names: Iterable[str]) -> Table | None:
    """outcomes: node id of a test -> whether it passed. None where no test of a family ran. A cell without a test that
    ran is empty."""
    found = [(test, passed) for test, passed in outcomes.items() if FILE in test and family_of(test, names)]
    if not found:
        return None
    made = Table("family", *COLUMNS, title="hhattn.swap on diffusers' own classes, small and random")
    for name in names:
        own = [(test.split(FILE)[1], passed) for test, passed in found if family_of(test, names) == name]
        cells = [[passed for test, passed in own if test.startswith(start)] for start in COLUMNS.values()]
        made.add_row(name, *("" if not cell else "✓" if all(cell) else "✗" for cell in cells))
    return made
