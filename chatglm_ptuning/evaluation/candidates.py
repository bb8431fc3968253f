"""Exact conditional log-likelihoods of candidate answers: one pass for the prompt, one for a tree of candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.evaluation.batches import evaluating, in_batches
from chatglm_ptuning.model.frozen_linear import apply_linear
from chatglm_ptuning.model.zero3 import most_of_processes
from chatglm_ptuning.prefix.batch import PrefixArgument, PrefixBatch

if TYPE_CHECKING:
    from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration

CANDIDATE_ATTENTIONS = ("sdpa", "eager")
"""Attention implementations that accept the mask of a candidate tree."""


def score_candidates(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int = 8,
    chunk_size: int = 512,
    prefix: PrefixArgument = None,
    progress: bool = False,
) -> list[torch.Tensor]:
    """The log-likelihood of every candidate behind every prompt.

    It is the sum of log P(token | prompt, tokens before) over the candidate's tokens, including the end token if the
    candidate has one, which separates a candidate from a longer one. A prompt runs through the model once. Then its
    candidates run through it together, as a tree in which common prefixes share a branch: every token attends to the
    prompt and its own branch, at the position that it would have alone.

    Args:
        prompts: ids of the prompts alone.
        candidates: ids of the candidates, the same for all prompts, or a list of them for each prompt.
        batch_size: prompts per batch.
        chunk_size: most tokens of a prompt's tree in one forward pass, and most rows of logits in memory. Results do
            not depend on it.
        prefix: as for a forward pass, for all prompts or one for each; by default the selected one.
        progress: whether to show a bar on stderr.

    Returns:
        For every prompt, float32 `[num_candidates]` on the CPU.

    Raises:
        ValueError: if a prompt or candidate is empty or a number out of range, the prefix is untrained, the prefixes
            are for another number of prompts, or the attention implementation accepts no custom mask.
    """
    per_prompt = _per_prompt(prompts, candidates, batch_size, chunk_size)
    implementation = model.config._attn_implementation
    if implementation not in CANDIDATE_ATTENTIONS:
        raise ValueError(
            f"Scoring candidates needs a custom mask, which attention {implementation!r} does not accept: call "
            "model.set_attn_implementation('sdpa')."
        )
    with torch.no_grad():
        prefix = model.resolve_prefix(prefix)
    prefix.check_rows(len(prompts))
    model.check_prefix_is_trained(prefix)
    scores: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    with evaluating(model):
        for rows in in_batches(model, prompts, batch_size, "scoring candidates", progress):
            own = [[of_all[row] for row in rows] for of_all in (prompts, per_prompt)]
            batch = _score_batch(model, *own, prefix.select(rows), chunk_size)
            for row, values in zip(rows, batch, strict=True):
                scores[row] = values
    return scores


@dataclass
class _Tree:
    """Candidates as a tree of tokens; only nodes with children run through the model.

    Attributes:
        tokens, parents, depths: of the inner nodes, a parent before its children; the parent of a first token is -1.
        steps: per candidate, its path of (inner node or -1 for the prompt, next token).
        members: index of each candidate in the whole list.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    steps: list[list[tuple[int, int]]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)


def _trees(candidates: Sequence[Sequence[int]], chunk_size: int) -> Iterator[_Tree]:
    """Trees of at most `chunk_size` inner nodes, or of a single longer candidate."""
    tree, nodes = _Tree(), {}
    for member in sorted(range(len(candidates)), key=lambda index: tuple(candidates[index])):
        candidate = tuple(candidates[member])
        new = sum(candidate[:end] not in nodes for end in range(1, len(candidate)))
        if tree.members and len(tree.tokens) + new > chunk_size:
            yield tree
            tree, nodes = _Tree(), {}
        steps, node = [], -1
        for depth, token in enumerate(candidate):
            steps.append((node, token))
            way = candidate[: depth + 1]
            if depth + 1 == len(candidate):
                break
            if way not in nodes:
                nodes[way] = len(tree.tokens)
                tree.tokens.append(token)
                tree.parents.append(node)
                tree.depths.append(depth)
            node = nodes[way]
        tree.steps.append(steps)
        tree.members.append(member)
    yield tree


@torch.no_grad()
def _score_batch(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[Sequence[int]]],
    prefix: PrefixBatch,
    chunk_size: int,
) -> list[torch.Tensor]:
    device = model.device
    batch = PaddingCollator(model.config.pad_token_id or 0, "left")([{"input_ids": list(prompt)} for prompt in prompts])
    mask = batch["attention_mask"].to(device, torch.bool)
    output = model.transformer(
        input_ids=batch["input_ids"].to(device), attention_mask=mask.long(),
        position_ids=batch["position_ids"].to(device), use_cache=True, prefix=prefix,
    )  # fmt: skip
    after_prompt = output.last_hidden_state[:, -1]
    cache = output.past_key_values
    scores = [torch.zeros(len(row)) for row in candidates]
    of_rows = [list(_trees(row, chunk_size)) for row in candidates]
    for turn in range(most_of_processes(model, max(map(len, of_rows)))):
        trees = [row[turn] if turn < len(row) else _Tree() for row in of_rows]
        nodes = most_of_processes(model, max(len(tree.tokens) for tree in trees))
        hidden = after_prompt[:, None]
        if nodes:
            inner = _run_trees(model, trees, nodes, mask, cache, prefix)
            cache.crop(-nodes)  # keeps the prompt, for the next trees
            hidden = torch.cat((hidden, inner), dim=1)
        for row, tree in enumerate(trees):
            values = _log_probabilities(model, hidden[row], tree, chunk_size)
            for member, steps in zip(tree.members, tree.steps, strict=True):
                scores[row][member] = sum(values[step] for step in steps)
    return scores


def _run_trees(
    model: ChatGLMForConditionalGeneration,
    trees: Sequence[_Tree],
    nodes: int,
    prompt_mask: torch.Tensor,
    cache: Cache,
    prefix: PrefixBatch,
) -> torch.Tensor:
    """Hidden states of the inner nodes `[batch, nodes, hidden_size]`; rows with fewer nodes are padded."""
    rows, device = len(trees), prompt_mask.device
    input_ids = torch.zeros(rows, nodes, dtype=torch.long)
    depths = torch.zeros(rows, nodes, dtype=torch.long)
    sees = torch.eye(nodes, dtype=torch.bool).repeat(rows, 1, 1)
    for row, tree in enumerate(trees):
        used = len(tree.tokens)
        input_ids[row, :used] = torch.tensor(tree.tokens, dtype=torch.long)
        depths[row, :used] = torch.tensor(tree.depths, dtype=torch.long)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                sees[row, node] |= sees[row, parent]
    lengths = prompt_mask.sum(-1, keepdim=True)
    mask = torch.cat((prompt_mask[:, None].expand(-1, nodes, -1), sees.to(device)), dim=-1)[:, None]
    return model.transformer(
        input_ids=input_ids.to(device), attention_mask=mask, position_ids=lengths + depths.to(device),
        past_key_values=cache, use_cache=True, prefix=prefix,
    ).last_hidden_state  # fmt: skip


def _log_probabilities(
    model: ChatGLMForConditionalGeneration, hidden: torch.Tensor, tree: _Tree, chunk_size: int
) -> dict[tuple[int, int], float]:
    """log P(token | node) of every step that a candidate takes; the node -1 is the end of the prompt."""
    wanted = sorted({step for steps in tree.steps for step in steps})
    values: dict[tuple[int, int], float] = {}
    for start in range(0, len(hidden), chunk_size):  # with ZeRO-3 all processes need equally many
        logits = apply_linear(model.transformer.output_layer, hidden[start : start + chunk_size]).float()
        steps = [step for step in wanted if start <= step[0] + 1 < start + chunk_size]
        if not steps:
            continue
        places = torch.tensor([node + 1 - start for node, _ in steps], device=logits.device)
        tokens = torch.tensor([token for _, token in steps], device=logits.device)
        picked = logits[places, tokens] - logits.logsumexp(-1)[places]
        values |= dict(zip(steps, picked.tolist(), strict=True))
    return values


def _per_prompt(
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
    batch_size: int,
    chunk_size: int,
) -> Sequence[Sequence[Sequence[int]]]:
    """A list of candidates for each prompt, checked."""
    for name, value in (("batch_size", batch_size), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    shared = all(len(candidate) and isinstance(candidate[0], int) for candidate in candidates)
    per_prompt = [candidates] * len(prompts) if shared else candidates
    if len(per_prompt) != len(prompts):
        raise ValueError(f"There are candidates for {len(per_prompt)} prompts, but {len(prompts)} prompts.")
    for index, (prompt, row) in enumerate(zip(prompts, per_prompt, strict=True)):
        if not len(prompt):
            raise ValueError(f"Prompt {index} (counted from 0) has no tokens.")
        if not len(row):
            raise ValueError(f"There are no candidates for prompt {index} (counted from 0).")
        for place, candidate in enumerate(row):
            if not isinstance(candidate, Sequence) or not len(candidate):
                raise ValueError(f"Candidate {place} of prompt {index} (both counted from 0) has no tokens.")
    return per_prompt
