"""Steps as CUDA graphs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Reads input buffers at fixed addresses; returns logits, and the most probable tokens (`sampling.most_probable`)."""
_ONE_AT_A_TIME = threading.Lock()
"""CUDA allows a process one recording at a time; there may be engines on several threads."""


class GraphRecorder:
    """Records steps as CUDA graphs, which launch all kernels of a step at once. The graphs share their memory.

    A graph repeats what the GPU was told: kernels, shapes and addresses. Numbers from Python would stay those of the
    recording. So a step reads all that changes from its buffers, and neither waits for the GPU nor looks at its values.

    All steps are recorded on one stream: cuBLAS keeps 32 MiB for each stream that it was used on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """The recorded step; the step itself if there is no memory for a graph.

        The step is called here: it must be one that may be repeated.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # The outer context restores the stream, which a recording that fails may leave.
            with _ONE_AT_A_TIME, torch.cuda.stream(self._stream):
                self._stream.wait_stream(current)
                step()  # loads kernels and allocates workspaces, which cannot be recorded
                current.wait_stream(self._stream)
                # Other threads may use the GPU meanwhile, to load prefixes.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    results = step()
        except torch.cuda.OutOfMemoryError:
            self._stream.synchronize()  # what was started writes to the cache, too
            logger.warning("No GPU memory is left for a CUDA graph: steps of this size take longer. Use fewer slots.")
            return step

        def replay() -> tuple[torch.Tensor, torch.Tensor]:
            graph.replay()
            return results

        return replay
