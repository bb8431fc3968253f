"""Tasks of lm-evaluation-harness: C-Eval and CMMLU with local data, and any other by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.task import Task as HarnessTask
from lm_eval.tasks import TaskManager

from chatglm_ptuning.data.tasks.checked_yaml import nearest
from chatglm_ptuning.data.tasks.examples import ChoiceExample
from chatglm_ptuning.data.tasks.read import chosen_subjects, read_examples
from chatglm_ptuning.data.tasks.registry import load_task
from chatglm_ptuning.data.tasks.task import Task


@dataclass(frozen=True)
class Exam:
    """An examination that both the registry and lm-eval have.

    Attributes:
        task: of the registry, with lm-eval's prompt.
        group: lm-eval's name for all subjects.
        prefix: of lm-eval's name for a subject; the subject's name follows it.
        question, answer: columns of lm-eval's rows.
        split: that lm-eval scores; few-shot examples are from `dev`.
    """

    task: Task
    group: str
    prefix: str
    question: str
    answer: str
    split: str

    @property
    def folder(self) -> Path:
        """lm-eval's own definitions."""
        return Path(lm_eval.tasks.__file__).parent / self.task.name


def exams() -> list[Exam]:
    """C-Eval, whose test answers are not public, on its validation split; CMMLU on its test split."""
    prompt = "{question}\n{options}\n答案："
    ceval, cmmlu = (replace(load_task(name), prompt=prompt) for name in ("ceval", "cmmlu"))
    return [
        Exam(ceval, "ceval-valid", "ceval-valid_", "question", "answer", "val"),
        Exam(cmmlu, "cmmlu", "cmmlu_", "Question", "Answer", "test"),
    ]


@dataclass(frozen=True)
class Selection:
    """The tasks of a run.

    Attributes:
        exams: examination -> its chosen subjects.
        others: lm-eval's names of the other tasks.
    """

    exams: Mapping[str, tuple[Exam, tuple[str, ...]]]
    others: tuple[str, ...]


def select_tasks(names: Sequence[str], subjects: Sequence[str] | None = None) -> Selection:
    """Resolves names to examinations with their subjects, and to other tasks.

    Args:
        names: `ceval`, `cmmlu`, lm-eval's names for them or one of their subjects (`ceval-valid_law`), or any other
            task, group or tag of lm-eval.
        subjects: of the examinations, only these subjects, categories or groups. Each must be one of an examination.

    Raises:
        ValueError: if a subject is unknown, or subjects are given without an examination.
    """
    chosen: dict[str, tuple[Exam, tuple[str, ...]]] = {}
    others = []
    for name in names:
        for exam in exams():
            own = _named_subjects(exam, name, subjects)
            if own is not None:
                _, known = chosen.get(exam.task.name, (exam, ()))
                wanted = {*known, *own}
                chosen[exam.task.name] = exam, tuple(entry for entry in exam.task.subjects if entry in wanted)
                break
        else:
            others.append(name)
    if subjects and not chosen:
        raise ValueError("subjects are those of ceval and cmmlu, and the tasks include neither.")
    known = sorted(set().union(*(_subject_names(exam.task) for exam, _ in chosen.values())))
    for name in subjects or ():
        if name not in known:
            raise ValueError(
                f"No subject, category or group '{name}' in {' and '.join(chosen)}{nearest(name, known)}; a subject is "
                "named after its file."
            )
    return Selection({name: entry for name, entry in chosen.items() if entry[1]}, tuple(others))


def _named_subjects(exam: Exam, name: str, subjects: Sequence[str] | None) -> list[str] | None:
    if name in (exam.task.name, exam.group, *exam.task.aliases):
        known = None if subjects is None else [entry for entry in subjects if entry in _subject_names(exam.task)]
        return [entry for entry in chosen_subjects(exam.task, known) if entry is not None]
    subject = name.removeprefix(exam.prefix)
    return [subject] if name != subject and subject in exam.task.subjects else None


def _subject_names(task: Task) -> set[str]:
    return {*task.subjects, *task.groups, *(subject.category for subject in task.subjects.values())}


def load_harness_tasks(
    selection: Selection,
    *,
    data_dir: str | None = None,
    num_fewshot: int | None = None,
    include_path: Sequence[str] = (),
) -> list[HarnessTask]:
    """Builds lm-eval's task objects from its own definitions.

    Args:
        data_dir: of the examinations, the folder of the published files, or another source of `read_examples`; None to
            let lm-eval load its data sets from the Hugging Face hub.
        num_fewshot: number of solved examples in the prompt.
        include_path: folders with further task definitions, which override lm-eval's own of the same name.

    Raises:
        ValueError: if a file is missing or wrong, has too few examples, or a task is unknown.
        ConnectionError: if a data set cannot be loaded from the hub.
    """
    for folder in include_path:
        if not Path(folder).is_dir():
            raise ValueError(f"include_path: {folder} is not a folder.")
    folders = [str(exam.folder) for exam, _ in selection.exams.values()]
    manager = TaskManager(include_path=[*folders, *include_path], include_defaults=False)
    if any(name not in manager.all_tasks for name in selection.others):
        manager = TaskManager(include_path=list(include_path))  # half a minute: lm-eval has thousands of files
    for name in selection.others:
        if name not in manager.all_tasks:
            raise ValueError(
                f"lm-eval has no task '{name}'{nearest(name, manager.all_tasks)}. `lm_eval ls tasks` lists them; set "
                "include_path to the folder of your own definitions."
            )
    tasks = [task for name in selection.others for task in _load(manager, name)]
    for exam, subjects in selection.exams.values():
        members: list[dict[str, Any]] = [{"task": exam.prefix + subject} for subject in subjects]
        if data_dir is not None:
            members = [_with_local_data(exam, subject, data_dir, num_fewshot or 0) for subject in subjects]
        # Members of a group are lm-eval's own definitions with these changes.
        tasks += _load(manager, {"group": f"chosen_{exam.group}", "task": members})
    return tasks


def _load(manager: TaskManager, specification: str | dict[str, Any]) -> list[HarnessTask]:
    try:
        return list(manager.load([specification])["tasks"].values())
    except (OSError, RuntimeError) as error:  # raised by datasets without a network, or for unreadable data
        name = specification if isinstance(specification, str) else specification["group"].removeprefix("chosen_")
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConnectionError(
            f"lm-eval could not load the data of {name}: {reason} Without a network, set data_dir to the folder of the "
            "published files of C-Eval or CMMLU, or for another task include_path to the folder of a definition with a "
            "local dataset_path."
        ) from error


def _with_local_data(exam: Exam, subject: str, data_dir: str, num_fewshot: int) -> dict[str, Any]:
    """The changes to lm-eval's definition that replace its data set."""
    splits = {exam.split: _rows(exam, subject, data_dir, exam.split)}
    changes: dict[str, Any] = {"task": exam.prefix + subject, "dataset_path": data_dir}
    if num_fewshot:
        splits["dev"] = _rows(exam, subject, data_dir, "dev")
        if len(splits["dev"]) < num_fewshot:
            raise ValueError(
                f"{data_dir} has {len(splits['dev'])} examples of {exam.task.name}, subject {subject}, split dev: "
                f"num_fewshot {num_fewshot} is too many."
            )
    else:
        changes |= {"fewshot_split": None, "fewshot_config": None}  # the dev files may be missing
    return changes | {"custom_dataset": lambda **_: splits}


def _rows(exam: Exam, subject: str, data_dir: str, split: str) -> datasets.Dataset:
    """A split of one subject with the columns of lm-eval's definition, all text."""
    rows = []
    for example in read_examples(exam.task, data_dir, split, subjects=[subject]):
        if example.gold is None:
            raise ValueError(f"{example.where}: there is no answer, which lm-eval needs to score.")
        options = dict(zip("ABCD", example.candidates, strict=True))
        rows.append(
            {"id": str(example.id), exam.question: example.question, **options, exam.answer: "ABCD"[example.answer]}
        )
    return datasets.Dataset.from_list(rows)


def scored_examples(
    exam: Exam, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[ChoiceExample, list[float]]]:
    """Each question of lm-eval's samples of an examination, and the log-likelihoods of its four letters."""
    for subject, entry in exam.task.subjects.items():
        for sample in sorted(samples.get(exam.prefix + subject, ()), key=lambda sample: sample["doc_id"]):
            row = sample["doc"]
            example = ChoiceExample(
                id=row.get("id", sample["doc_id"]),
                where=f"{exam.prefix}{subject}, question {sample['doc_id'] + 1}",
                question=row[exam.question].strip(),
                candidates=tuple(row[letter] for letter in "ABCD"),
                answer="ABCD".index(row[exam.answer]),
                subject=subject,
                category=entry.category,
            )
            yield example, [float(score) for score, _ in sample["filtered_resps"]]
