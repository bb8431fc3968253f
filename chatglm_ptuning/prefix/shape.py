"""The sizes of a base that a prefix must match."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefixShape:
    """Sizes of a prefix's keys and values, and the parameters of the base's rotary positions.

    Attributes:
        multi_query_group_num: key/value groups of a layer.
        kv_channels: size of one key or value.
        rope_base: base of the rotary frequencies.
        position_scale: divides positions before the rotation.
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
        """Shape of one virtual token, `(num_layers * 2, groups, kv_channels)`: a layer's keys, then its values."""
        return self.num_layers * 2, self.multi_query_group_num, self.kv_channels

    @property
    def kv_size(self) -> int:
        """Size of one virtual token."""
        return self.num_layers * 2 * self.multi_query_group_num * self.kv_channels
