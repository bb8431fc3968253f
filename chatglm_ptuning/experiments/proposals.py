"""Optuna's TPE and successive halving over the trials of a search: which setting is next, which run is pruned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm_ptuning.experiments.run import Evaluation, Run
from chatglm_ptuning.experiments.search_arguments import PROJECTIONS, SearchArguments, Setting
from chatglm_ptuning.files import write_atomically
from chatglm_ptuning.training.initialisation import PREFIX_INITS

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "study.db"


def lost_rung(
    points: Sequence[Evaluation], others: Sequence[Run], args: SearchArguments, lower_is_better: bool
) -> int | None:
    """The rung of successive halving that prunes a run at its last evaluation; None if the run continues.

    Asynchronous successive halving (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning"), with the
    decisions of optuna's `SuccessiveHalvingPruner`: rung r is at the first evaluation from step `min_resource *
    reduction_factor ** r` on. There a run must be among the best 1 / `reduction_factor` of the runs that have reached
    the rung, or the best if they are fewer.
    """
    now, before = points[-1], points[-2].step if len(points) > 1 else 0
    sign = 1 if lower_is_better else -1
    rung = 0
    while (step := args.min_resource * args.reduction_factor**rung) <= now.step:
        if before < step:
            scores = [now.score, *(_score_at(other, step, rung) for other in others)]
            best_first = sorted(sign * score for score in scores if not math.isnan(score))
            place = max(len(best_first) // args.reduction_factor, 1) - 1
            if math.isnan(now.score) or sign * now.score > best_first[place]:
                return rung
        rung += 1
    return None


def _score_at(run: Run, step: int, rung: int) -> float:
    """The score of a run at a rung; NaN if it has not reached it."""
    ending = run.ending()
    if ending is not None and ending.error is None and ending.rung < rung:
        return math.nan
    return next((point.score for point in run.evaluations() if point.step >= step), math.nan)


def propose(args: SearchArguments, rows: Sequence[Mapping[str, Any]], lower_is_better: bool) -> Setting:
    """The setting that TPE proposes after the trials so far; deterministic."""
    import optuna

    sampler = optuna.samplers.TPESampler(seed=args.search_seed + 1000 * len(rows), constant_liar=True)
    study = optuna.create_study(direction=_direction(lower_is_better), sampler=sampler)
    study.add_trials([_trial(row, args) for row in rows])
    chosen = study.ask(_distributions(args)).params
    return {name: chosen[name] for name in args.grid()[0]}


def write_study(folder: Path, args: SearchArguments, rows: Sequence[Mapping[str, Any]], lower_is_better: bool) -> None:
    """Writes the trials that have ended into `study.db`, for Optuna's own tools."""
    import optuna

    with write_atomically(folder.resolve() / STUDY_FILE) as temporary:
        storage = optuna.storages.RDBStorage(f"sqlite:///{temporary}")
        study = optuna.create_study(storage=storage, study_name="search", direction=_direction(lower_is_better))
        study.add_trials([_trial(row, args) for row in rows if row["state"] not in ("running", "waiting")])
        storage.engine.dispose()


def _direction(lower_is_better: bool) -> str:
    return "minimize" if lower_is_better else "maximize"


def _distributions(args: SearchArguments) -> dict[str, optuna.distributions.BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if args.is_grid:  # its lists may grow, and categories of optuna may not
        return {
            "pre_seq_len": IntDistribution(1, 2**31),
            "learning_rate": FloatDistribution(0.0, 1e300),
            "prefix_projection": CategoricalDistribution((False, True)),
            "prefix_init": CategoricalDistribution(PREFIX_INITS),
        }
    rates, scale = args.learning_rate, args.learning_rate_scale
    rate = CategoricalDistribution(rates) if scale == "values" else FloatDistribution(*rates, log=scale == "log")
    return {
        "learning_rate": rate,
        "pre_seq_len": CategoricalDistribution(args.pre_seq_len),
        "prefix_projection": CategoricalDistribution(PROJECTIONS[args.prefix_projection]),
        "prefix_init": CategoricalDistribution(args.prefix_init),
    }


def _trial(row: Mapping[str, Any], args: SearchArguments) -> optuna.trial.FrozenTrial:
    from optuna.trial import TrialState, create_trial

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    points = next((seed["points"] for seed in row["seeds"].values()), [])
    return create_trial(
        state=states.get(row["state"], TrialState.RUNNING),
        value=row.get("mean"),
        params=row["setting"],
        distributions=_distributions(args),
        intermediate_values={step: score for step, score, _ in points},
        user_attrs={"seeds": row["seeds"]},
    )
