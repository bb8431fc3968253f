"""First values of a linear head: the best one on the states of the untuned base.

Tuning then starts from a head that already works, instead of following a random one (linear probing before tuning:
Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution").
Gradient steps reach that head slowly: the states of a base have a large mean that all rows share, which one step size
for all directions cannot serve.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from chatglm_ptuning.model.losses import IGNORED_LABEL
from chatglm_ptuning.model.modeling_heads import Head

HeadInit = Literal["probe", "random"]
MAX_STATES = 20_000
"""States that a head is fitted to at most: 330 MB in float32 at a hidden size of 4,096."""
MAX_PRODUCTS = 6_000_000_000
"""States x hidden size x outputs of a fit at most. An iteration then takes 1.4 seconds of a core, and 200 are the most:
five minutes. It is 12,309 states at a hidden size of 4,096 with 119 outputs; IFLYTEK has 12,133."""
_CHOICE_STATES = 2_000
"""States used to choose the regularisation strength, if a fit to all has more than `_CHEAP_PRODUCTS`."""
_CHEAP_PRODUCTS = 500_000_000
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_HELD_OUT = 0.2
_FEW = 20


def start_head(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    *,
    head_init: HeadInit,
    batch_size: int,
    seed: int,
) -> int:
    """Sets the first values of a model's linear head, if it is trained and still random.

    Not under ZeRO-3, where the head is in pieces before training starts, nor for spans.

    Args:
        model, rows, collate, batch_size, seed: as for `probe_head`.

    Returns:
        The number of states that the head was fitted to; 0 if it is left unchanged.
    """
    heads = (module for module in model.modules() if isinstance(module, Head) and module.weight.requires_grad)
    head = next(heads, None)
    if head_init != "probe" or head is None or not head.is_untrained or "labels" not in rows[0]:
        return 0
    return probe_head(model, head, rows, collate, batch_size=batch_size, seed=seed)


def probe_head(
    model: PreTrainedModel,
    head: Head,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    *,
    batch_size: int,
    seed: int,
) -> int:
    """Sets the head to a logistic regression from its current inputs to the rows' labels.

    Its strength of regularisation is chosen on a fifth of the rows, in large fits of 2,000 of them. Several labels at
    once are as many regressions. Every process of a job computes the same head.

    Args:
        model: calls the head; its other parameters are not changed.
        rows: training rows with `labels`: a class, a list of 0.0 and 1.0, or a class for each token.
        collate: makes a batch of rows.
        batch_size: rows in one forward pass.
        seed: of the choice of rows, where there are more states than `MAX_STATES` or `MAX_PRODUCTS` allow.

    Returns:
        The number of states that the head was fitted to; 0 if it stays random, as all labels are the same.
    """
    states, labels = _states_and_labels(model, head, rows, collate, batch_size, seed)
    fitted = _fit(states, labels, head.out_features, seed)
    if fitted is None:
        return 0
    weight, bias = fitted
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    head.mark_set()
    return len(states)


@torch.no_grad()
def _states_and_labels(
    model: PreTrainedModel,
    head: Head,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    batch_size: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the head `[n, hidden_size]` and their labels `[n]` or `[n, num_labels]`."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    most = min(MAX_STATES, MAX_PRODUCTS // head.weight.numel())
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu()))
    states, labels, count, training = [], [], 0, model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            batch = collate([rows[place] for place in order[start : start + batch_size]])
            target = batch["labels"]
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            moved = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in inputs.items()}
            model(**moved)
            of_batch = seen.pop()
            if not target.is_floating_point():
                known = target != IGNORED_LABEL
                of_batch, target = of_batch[known], target[known]
            states.append(of_batch)
            labels.append(target)
            count += len(target)
            if count >= most:
                break
    finally:
        hook.remove()
        model.train(training)
    return torch.cat(states)[:most].numpy(), torch.cat(labels)[:most].numpy()


def _fit(states: np.ndarray, labels: np.ndarray, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight `[outputs, hidden_size]` and bias `[outputs]`, float32; None if all labels are equal."""
    mean, scale = states.mean(0), states.std(0)
    scale = np.where(scale > 1e-6 * max(float(scale.max()), 1e-30), scale, 1.0)
    standard = (states - mean) / scale
    choice = len(states) if states.size * outputs <= _CHEAP_PRODUCTS else _CHOICE_STATES
    if labels.ndim == 1:
        fitted = _fit_classes(standard, labels, outputs, choice, seed)
        if fitted is None:
            return None
        weight, bias = fitted
    else:
        weight, bias = np.zeros((outputs, states.shape[1])), np.zeros(outputs)
        for place, column in enumerate(labels.T):
            binary = _fit_classes(standard, column.astype(np.int64), 2, choice, seed)
            if binary is None:
                bias[place] = math.log((column.sum() + 0.5) / (len(column) - column.sum() + 0.5))
            else:
                weight[place], bias[place] = binary[0][1] - binary[0][0], binary[1][1] - binary[1][0]
    weight = weight / scale
    return weight.astype(np.float32), (bias - weight @ mean).astype(np.float32)


def _fit_classes(
    states: np.ndarray, labels: np.ndarray, outputs: int, choice: int, seed: int
) -> tuple[np.ndarray, np.ndarray] | None:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classes = np.unique(labels)
    if len(classes) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an approximate optimum is enough to start from
        strength = _choose_strength(states, labels, choice, seed)
        found = LogisticRegression(C=strength, max_iter=200).fit(states, labels)
    weight, bias = np.zeros((outputs, states.shape[1])), np.empty(outputs)
    if len(classes) == 2:  # one row of weights, for the second class
        found_weight = np.concatenate([-found.coef_, found.coef_]) / 2
        found_bias = np.concatenate([-found.intercept_, found.intercept_]) / 2
    else:
        found_weight, found_bias = found.coef_, found.intercept_
    bias[:] = found_bias.min() - math.log(len(labels) + 1)  # a class without rows is rarer than all others
    weight[classes], bias[classes] = found_weight, found_bias
    return weight, bias


def _choose_strength(states: np.ndarray, labels: np.ndarray, choice: int, seed: int) -> float:
    """scikit-learn's C with the lowest loss on rows that are held out of `choice` of them."""
    from sklearn.linear_model import LogisticRegression

    order = np.random.default_rng(seed).permutation(len(labels))[:choice]
    cut = int(len(order) * _HELD_OUT)
    held_out, fitted = order[:cut], order[cut:]
    known = np.unique(labels[fitted])
    held_out = held_out[np.isin(labels[held_out], known)]
    if len(labels) < _FEW or len(known) < 2 or not len(held_out):
        return 1e-1
    losses = []
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=200).fit(states[fitted], labels[fitted])
        places = np.searchsorted(known, labels[held_out])
        losses.append(-model.predict_log_proba(states[held_out])[np.arange(len(places)), places].mean())
    return _STRENGTHS[int(np.argmin(losses))]
