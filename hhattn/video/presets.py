"""The sizes that can be generated. The model draws 720 rows; smaller outputs are drawn whole and scaled down."""

from __future__ import annotations

from dataclasses import dataclass

from .codec import SPACE


@dataclass(frozen=True)
class Size:
    """``native`` (height, width) is what is drawn, ``output`` what is written. Rows are generated in excess and
    cropped."""

    native: tuple[int, int]
    output: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Latent cells, rows x columns: 720x1280 is generated as 736x1280 = 23x40 cells."""
        return -(-self.native[0] // SPACE), -(-self.native[1] // SPACE)

    @property
    def margin(self) -> int:
        """Rows cropped at the top, and at the bottom."""
        return (self.grid[0] * SPACE - self.native[0]) // 2

    @property
    def aspect(self) -> float:
        return self.native[1] / self.native[0]


SIZES = {
    "720x1280": Size((720, 1280), (720, 1280)),
    "720x960": Size((720, 960), (720, 960)),
    "720x704": Size((720, 704), (720, 704)),
    "360x640": Size((720, 1280), (360, 640)),
    "180x320": Size((720, 1280), (180, 320)),
}
