"""Decoding steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[[], torch.Tensor]
"""Reads input buffers at fixed addresses and returns logits."""


class GraphRecorder:
    """Records steps as CUDA graphs, which launch all kernels of a step at once. The graphs share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """The recorded step. The first calls of the step, here, compute what a later one would."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, to load prefixes.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay
