"""Chooses the next token of every row, each by its own settings."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch

from chatglm_ptuning.serving.engine.request import SamplingSettings, Token

_LOWEST_TEMPERATURE = 1e-6
"""Lower ones are rounded to 0 in float32."""
_FIRST_CANDIDATES = 64
"""So many most probable tokens often have the probability `top_p` together; sorting all takes much longer."""
_MORE = 4
"""Times as many are tried if they have not."""


def most_probable(logits: torch.Tensor) -> torch.Tensor:
    """The most probable token of every row, and 1 if its logits are finite, int64 `[2, rows]`.

    Args:
        logits: `[rows, vocabulary]`.
    """
    finite = logits.sum(dim=-1, dtype=torch.float32).isfinite()  # much faster than looking at each
    return torch.stack((logits.max(dim=-1).indices, finite.long()))


def choose(
    logits: torch.Tensor,
    best: torch.Tensor,
    settings: Sequence[SamplingSettings],
    known: Sequence[np.ndarray | None],
    randoms: Sequence[random.Random],
) -> list[Token | None]:
    """The next token of every row; None for a row whose logits are not finite.

    Greedy rows alone wait once for the GPU, and need no further work there.

    Args:
        logits: `[rows, vocabulary]`.
        best: of the logits, by `most_probable`.
        known: ids of the prompt and the answer so far, int64; read for a repetition penalty only.
        randoms: draws one number for each sampled token.
    """
    chosen, finite = best.tolist()
    penalised = [row for row, one in enumerate(settings) if finite[row] and one.repetition_penalty != 1]
    sampled = [row for row, one in enumerate(settings) if finite[row] and one.temperature > 0]
    if penalised or sampled:
        scores = logits.float()
        if penalised:
            own = _penalised(scores[penalised], [settings[row] for row in penalised], [known[row] for row in penalised])
            scores = scores.index_copy(0, torch.tensor(penalised, device=scores.device), own)
            _put(chosen, penalised, own.max(dim=-1).indices)
        if sampled:
            drawn = _sample(scores[sampled], [settings[row] for row in sampled], [randoms[row] for row in sampled])
            _put(chosen, sampled, drawn)
    logprobs = _logprobs(logits, settings, chosen)
    return [Token(token, *logprobs.get(row, ())) if finite[row] else None for row, token in enumerate(chosen)]


def _put(chosen: list[int], rows: Sequence[int], tokens: torch.Tensor) -> None:
    for row, token in zip(rows, tokens.tolist(), strict=True):
        chosen[row] = token


def _penalised(scores: torch.Tensor, settings: Sequence[SamplingSettings], known: Sequence[np.ndarray]) -> torch.Tensor:
    """The scores, with those of the known ids made smaller (larger for a penalty below 1)."""
    # Shorter ones are filled up with their first id, whose score is then written several times.
    ids = np.array([one[0] for one in known])[:, None].repeat(max(map(len, known)), axis=1)
    for row, one in enumerate(known):
        ids[row, : len(one)] = one
    ids = torch.from_numpy(ids).to(scores.device)
    penalties = scores.new_tensor([one.repetition_penalty for one in settings])[:, None]
    before = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(before < 0, before * penalties, before / penalties))


def _sample(
    scores: torch.Tensor, settings: Sequence[SamplingSettings], randoms: Sequence[random.Random]
) -> torch.Tensor:
    """Draws a token for every row, int64 `[rows]`."""
    draws = scores.new_tensor([one.random() for one in randoms], dtype=torch.float64)
    temperatures = scores.new_tensor([max(one.temperature, _LOWEST_TEMPERATURE) for one in settings])[:, None]
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperatures
    chosen = torch.empty(len(settings), dtype=torch.int64, device=scores.device)
    limited = [one.top_k > 0 or one.top_p < 1 for one in settings]
    for rows, draw in (
        ([row for row, limit in enumerate(limited) if not limit], _draw),
        ([row for row, limit in enumerate(limited) if limit], _draw_limited),
    ):
        if rows:
            chosen[rows] = draw(scores[rows], draws[rows], [settings[row] for row in rows])
    return chosen


def _draw(scores: torch.Tensor, draws: torch.Tensor, settings: Sequence[SamplingSettings]) -> torch.Tensor:
    """Draws from all tokens, by the inverse of the distribution function."""
    return _place_of(scores.double().softmax(dim=-1), draws)


def _draw_limited(
    scores: torch.Tensor, draws: torch.Tensor, settings: Sequence[SamplingSettings], count: int = _FIRST_CANDIDATES
) -> torch.Tensor:
    """Draws from the `top_k` most probable tokens, and of these from the fewest that have the probability `top_p`.

    Args:
        count: number of most probable tokens to look at first.
    """
    vocabulary = scores.shape[1]
    limits = [min(one.top_k or vocabulary, vocabulary) for one in settings]
    top_k = torch.tensor(limits, device=scores.device)[:, None]
    top_p = draws.new_tensor([one.top_p for one in settings])[:, None]
    count = min(vocabulary, count)
    candidates, ids = scores.topk(count)
    candidates = candidates.double().masked_fill(torch.arange(count, device=scores.device) >= top_k, -torch.inf)
    # Without top_k, probabilities are shares of all tokens, not only of the candidates.
    whole = scores.logsumexp(dim=-1, keepdim=True).double()
    whole = torch.where(top_k <= count, candidates.logsumexp(dim=-1, keepdim=True), whole)
    probabilities = (candidates - whole).exp()
    summed = probabilities.cumsum(dim=-1)
    kept = probabilities * (summed - probabilities < top_p)
    drawn = ids.gather(1, _place_of(kept, draws)[:, None])[:, 0]
    # A sum close to top_p counts as too small, as `whole` was rounded.
    is_enough = ((top_k <= count) | (summed[:, -1:] > top_p + 1e-5) & (top_k == vocabulary))[:, 0].tolist()
    more = [row for row, enough in enumerate(is_enough) if not enough]
    if more:
        own = [settings[row] for row in more]
        drawn[more] = _draw_limited(scores[more], draws[more], own, _MORE * count)
    return drawn


def _place_of(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The place in each row where the sum of the probabilities passes the drawn share of the whole."""
    summed = probabilities.cumsum(dim=-1)
    places = torch.searchsorted(summed, (draws * summed[:, -1])[:, None], right=True)[:, 0]
    return places.clamp(max=probabilities.shape[1] - 1)


def _logprobs(
    logits: torch.Tensor, settings: Sequence[SamplingSettings], chosen: Sequence[int]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """For the rows that ask for it: the log probability of the chosen token, and the most probable tokens."""
    rows = [row for row, one in enumerate(settings) if one.top_logprobs is not None]
    if not rows:
        return {}
    whole = logits[rows].float().log_softmax(dim=-1)
    own = whole.gather(1, torch.tensor([[chosen[row]] for row in rows], device=whole.device))[:, 0].tolist()
    count = min(max(settings[row].top_logprobs for row in rows), logits.shape[1])
    values, ids = (part.tolist() for part in whole.topk(count))
    found = {}
    for place, row in enumerate(rows):
        wanted = settings[row].top_logprobs
        found[row] = own[place], tuple(zip(ids[place][:wanted], values[place][:wanted], strict=True))
    return found
