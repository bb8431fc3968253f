"""A KV connector that gives vLLM the keys and values of a prefix as if its tokens had been computed elsewhere.

Its settings (`kv_connector_extra_config`): `prefix_dir`, the folder of exported prefixes; `placeholder_id`, the token
in the places of a prefix (0); `prefix_memory_mb`, memory of each worker for prefixes (1024).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.model_executor.models.utils import extract_layer_index

from .prefixes import SALT, Prefix, PrefixFolder

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(f"vllm.{__name__}")

_KeyValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values `[length, heads, channels]` of each layer of a worker."""


@dataclass
class Load:
    """Keys and values that a worker puts into blocks before its next step.

    Attributes:
        prefix: None if the request is not for a prefix as it says; it is then refused.
        start: the first virtual token to load; those before it are in the blocks already.
        block_ids: blocks of the whole prefix.
    """

    prefix: Prefix | None
    start: int
    block_ids: list[int]


@dataclass
class LoadMetadata(KVConnectorMetadata):
    """The loads of a step."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. One part of it runs with the scheduler, the other in each worker.

    Raises:
        ValueError: if vLLM is set up in a way in which prefixes do not work.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        if len(specs) != 1:
            raise ValueError("Prefixes need a model with one kind of attention cache.")
        if vllm_config.speculative_config is not None:
            raise ValueError("Prefixes do not work with speculative decoding: leave out --speculative-config.")
        setting = self._kv_transfer_config.get_from_extra_config
        self._block_size = specs[0].block_size
        self._folder = PrefixFolder(setting("prefix_dir", "prefixes"))
        self._placeholder = int(setting("placeholder_id", 0))
        self._memory = int(setting("prefix_memory_mb", 1024)) * 2**20
        self._loads: list[Load] = []
        self._loaded: OrderedDict[str, _KeyValues] = OrderedDict()  # the most recently used last
        self._layers: dict[int, Any] | None = None
        self._failed_blocks: set[int] = set()

    # The scheduler's part.

    def _prefix_of(self, request: Request) -> Prefix | None:
        """The prefix of a request that has its placeholders and a prompt; None if it must be refused."""
        try:
            prefix = self._folder.of_salt(request.cache_salt)
        except KeyError:
            return None
        ids, length = request.prompt_token_ids or [], prefix.length
        return prefix if len(ids) > length and set(ids[:length]) == {self._placeholder} else None

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """The virtual tokens that are not in this request's blocks."""
        if not (request.cache_salt or "").startswith(SALT):
            return 0, False
        # Set by prompt_logprobs. The placeholders would be computed, and cached as the prefix.
        request.skip_reading_prefix_cache = False
        prefix = self._prefix_of(request)
        if prefix is not None:
            return max(0, prefix.length - num_computed_tokens), False
        if request.num_tokens < 2:
            raise ValueError(f"The prompt {request.request_id} has the cache_salt of a prefix, and no placeholders.")
        return 1, False  # its load fails

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Notes the load of a request that was given blocks."""
        if num_external_tokens > 0:
            prefix = self._prefix_of(request)
            length = num_external_tokens if prefix is None else prefix.length
            used = -(-length // self._block_size)
            self._loads.append(Load(prefix, length - num_external_tokens, blocks.get_block_ids()[0][:used]))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> LoadMetadata:
        """The loads of the next step."""
        metadata, self._loads = LoadMetadata(self._loads), []
        return metadata

    def request_finished_all_groups(self, request: Request, block_ids: Any) -> tuple[bool, None]:
        """Blocks may be freed at once."""
        return False, None

    # The workers' part.

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Puts the prefixes of the step into their blocks."""
        loads = self._get_connector_metadata().loads
        if not loads:
            return
        if self._layers is None:
            layers = forward_context.no_compile_layers.items()
            self._layers = {extract_layer_index(name): layer for name, layer in layers if hasattr(layer, "kv_cache")}
        parts, slots = [], []
        for load in loads:
            try:
                if load.prefix is None:
                    raise ValueError("A request has the cache_salt of a prefix that is not there, or no placeholders.")
                parts.append((self._key_values(load.prefix), load.start))
            except (OSError, ValueError) as error:
                logger.error("A request is refused: %s", error)
                self._failed_blocks |= set(load.block_ids)
                continue
            positions = torch.arange(load.start, load.prefix.length)
            blocks = torch.tensor(load.block_ids)[positions // self._block_size]
            slots.append(blocks * self._block_size + positions % self._block_size)
        if not parts:
            return
        for index, layer in self._layers.items():
            key = torch.cat([part[index][0][start:] for part, start in parts])
            value = torch.cat([part[index][1][start:] for part, start in parts])
            # The backend's own writer: it knows the layout of the cache and its dtype.
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, torch.cat(slots).to(key.device))

    def _key_values(self, prefix: Prefix) -> _KeyValues:
        """This worker's layers and heads of a prefix, in the dtype of the activations, on its device."""
        name = prefix.content_hash
        if name not in self._loaded:
            self._loaded[name] = self._own_part(prefix)
            while len(self._loaded) > 1 and sum(map(_bytes, self._loaded.values())) > self._memory:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _own_part(self, prefix: Prefix) -> _KeyValues:
        whole, config = prefix.read(), self._vllm_config.model_config
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        sizes = (config.hf_text_config.num_hidden_layers, config.get_total_num_kv_heads(), config.get_head_size())
        if (whole.shape[0], *whole.shape[3:]) != sizes:
            raise ValueError(
                f"{prefix.path} is for another base: its (layers, groups, channels) are "
                f"{(whole.shape[0], *whole.shape[3:])}, those of the base {sizes}."
            )
        part = {}
        for index, layer in self._layers.items():
            first = rank * whole.shape[3] // ranks  # several ranks hold one group if there are more ranks than groups
            own = whole[index, :, :, first : first + layer.num_kv_heads]
            own = own.to(layer.kv_cache.device, config.dtype).contiguous()
            part[index] = (own[0], own[1])
        return part

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load failed in the last step: vLLM ends their requests with an error."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loading has ended when `start_load_kv` returns."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def _bytes(key_values: _KeyValues) -> int:
    return sum(key.nbytes + value.nbytes for key, value in key_values.values())
