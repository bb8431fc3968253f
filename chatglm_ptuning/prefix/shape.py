"""What a prefix needs to know of its base."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefixShape:
    """Sizes of the keys and values that a base takes as a prefix, and how it rotates keys by their positions.

    Attributes:
        multi_query_group_num: key/value groups of a layer.
        kv_channels: numbers of one key or value.
        rope_base: of the rotary frequencies.
        position_scale: by which positions are divided before they are rotated.
    """

    num_layers: int
    multi_query_group_num: int
    kv_channels: int
    rope_base: float = 10000.0
    position_scale: float = 1.0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`(num_layers, multi_query_group_num, kv_channels)`."""
        return self.num_layers, self.multi_query_group_num, self.kv_channels

    @property
    def per_token(self) -> tuple[int, int, int]:
        """Axes of one virtual token, `(num_layers * 2, groups, kv_channels)`: a layer's keys, then its values."""
        return self.num_layers * 2, self.multi_query_group_num, self.kv_channels

    @property
    def kv_size(self) -> int:
        """Numbers of one virtual token."""
        return self.num_layers * 2 * self.multi_query_group_num * self.kv_channels
