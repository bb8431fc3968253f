"""Chooses the next token of every row, each by its own settings."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

    The host waits once for a GPU; more often for log probabilities, and where the first candidates are too few.

    Args:
        logits: `[rows, vocabulary]`.
        best: of the logits, by `most_probable`.
        known: ids of the prompt and the answer so far, int64; read for a repetition penalty only.
        randoms: draws one number for each sampled token.
    """
    chosen, finite = best.clone()
    is_enough = torch.ones_like(finite)
    penalised = [row for row, one in enumerate(settings) if one.repetition_penalty != 1]
    sampled = [row for row, one in enumerate(settings) if one.temperature > 0]
    limited = [row for row in sampled if settings[row].top_k > 0 or settings[row].top_p < 1]
    draws = {row: randoms[row].random() for row in sampled}
    scores = logits.float() if penalised or sampled else logits
    if penalised:
        places = torch.tensor(penalised).to(scores.device, non_blocking=True)
        own = _penalised(scores[places], [settings[row] for row in penalised], [known[row] for row in penalised])
        scores = scores.index_copy(0, places, own)
        chosen[places] = own.max(dim=-1).indices
    if unlimited := [row for row in sampled if row not in set(limited)]:
        rows = _Sampled.of(scores, settings, draws, unlimited)
        chosen[rows.places] = _draw(rows)
    count = _FIRST_CANDIDATES
    while True:
        if limited:
            rows = _Sampled.of(scores, settings, draws, limited)
            chosen[rows.places], is_enough[rows.places] = _draw_limited(rows, count)
        ids, are_finite, are_enough = torch.stack((chosen, finite, is_enough)).tolist()
        limited = [row for row in limited if are_finite[row] and not are_enough[row]]
        if not limited:
            break
        count *= _MORE
    logprobs = _logprobs(logits, settings, chosen)
    return [Token(token, *logprobs.get(row, ())) if are_finite[row] else None for row, token in enumerate(ids)]


def _penalised(scores: torch.Tensor, settings: Sequence[SamplingSettings], known: Sequence[np.ndarray]) -> torch.Tensor:
    """The scores, with those of the known ids made smaller (larger for a penalty below 1)."""
    # Shorter ones are filled up with their first id, whose score is then written several times.
    ids = np.array([one[0] for one in known])[:, None].repeat(max(map(len, known)), axis=1)
    for row, one in enumerate(known):
        ids[row, : len(one)] = one
    ids = torch.from_numpy(ids).to(scores.device, non_blocking=True)
    penalties = scores.new_tensor([one.repetition_penalty for one in settings])[:, None]
    before = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(before < 0, before * penalties, before / penalties))


@dataclass(frozen=True)
class _Sampled:
    """Rows that are sampled.

    Attributes:
        places: of the rows in the batch, int64 `[rows]`.
        scores: logits by temperature, at most 0, float32 `[rows, vocabulary]`.
        draws, top_p, top_k: float64 `[rows, 1]`; without a limit, `top_k` is the size of the vocabulary.
    """

    places: torch.Tensor
    scores: torch.Tensor
    draws: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor

    @classmethod
    def of(
        cls,
        scores: torch.Tensor,
        settings: Sequence[SamplingSettings],
        draws: Mapping[int, float],
        rows: Sequence[int],
    ) -> _Sampled:
        """The rows at these places of the batch. One transfer brings their settings to the device."""
        vocabulary, own = scores.shape[1], [settings[row] for row in rows]
        top_k = [min(one.top_k or vocabulary, vocabulary) for one in own]
        numbers = [
            (row, max(one.temperature, _LOWEST_TEMPERATURE), draws[row], one.top_p, most)
            for row, one, most in zip(rows, own, top_k, strict=True)
        ]
        sent = torch.tensor(numbers, dtype=torch.float64).to(scores.device, non_blocking=True)
        places = sent[:, 0].long()
        _, temperatures, *others = sent.split(1, dim=1)
        chosen = scores[places]
        return cls(places, (chosen - chosen.amax(dim=-1, keepdim=True)) / temperatures.float(), *others)


def _draw(rows: _Sampled) -> torch.Tensor:
    """Draws from all tokens, by the inverse of the distribution function."""
    return _place_of(rows.scores.double().softmax(dim=-1), rows.draws)


def _draw_limited(rows: _Sampled, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from the `top_k` most probable tokens, and of these from the fewest that have the probability `top_p`.

    Args:
        count: number of most probable tokens to look at.

    Returns:
        Tokens, and 1 where so many were enough, int64 `[rows]` each.
    """
    count = min(rows.scores.shape[1], count)
    candidates, ids = rows.scores.topk(count)
    hidden = torch.arange(count, device=candidates.device) >= rows.top_k
    candidates = candidates.double().masked_fill(hidden, -torch.inf)
    # Without top_k, probabilities are shares of all tokens, not only of the candidates.
    whole = rows.scores.logsumexp(dim=-1, keepdim=True).double()
    has_all = rows.top_k <= count
    whole = torch.where(has_all, candidates.logsumexp(dim=-1, keepdim=True), whole)
    probabilities = (candidates - whole).exp()
    summed = probabilities.cumsum(dim=-1)
    kept = probabilities * (summed - probabilities < rows.top_p)
    drawn = ids.gather(1, _place_of(kept, rows.draws)[:, None])[:, 0]
    # A sum close to top_p counts as too small, as `whole` was rounded.
    is_enough = has_all | (summed[:, -1:] > rows.top_p + 1e-5) & (rows.top_k == rows.scores.shape[1])
    return drawn, is_enough[:, 0].long()


def _place_of(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The place in each row where the sum of the probabilities passes the drawn share of the whole."""
    summed = probabilities.cumsum(dim=-1)
    places = torch.searchsorted(summed, draws * summed[:, -1:], right=True)[:, 0]
    return places.clamp(max=probabilities.shape[1] - 1)


def _logprobs(
    logits: torch.Tensor, settings: Sequence[SamplingSettings], chosen: torch.Tensor
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """For the rows that ask for it: the log probability of the chosen token, and the most probable tokens."""
    rows = [row for row, one in enumerate(settings) if one.top_logprobs is not None]
    if not rows:
        return {}
    whole = logits[rows].float().log_softmax(dim=-1)
    own = whole.gather(1, chosen[rows][:, None])[:, 0].tolist()
    count = min(max(settings[row].top_logprobs for row in rows), logits.shape[1])
    values, ids = (part.tolist() for part in whole.topk(count))
    found = {}
    for place, row in enumerate(rows):
        wanted = settings[row].top_logprobs
        found[row] = own[place], tuple(zip(ids[place][:wanted], values[place][:wanted], strict=True))
    return found
