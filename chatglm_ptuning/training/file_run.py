"""A run on data files: what was read, the model, and the steps that the flags ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from chatglm_ptuning.data.cache import TokenCache
from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.dataset import Loader, Split, shared_rows
from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.heads.head import Head, Prediction
from chatglm_ptuning.evaluation.inference import InferenceSettings, predict, predict_beside_base
from chatglm_ptuning.evaluation.recorded import described_tasks, recorded_details, tasks_of
from chatglm_ptuning.evaluation.report import print_scores, score_task
from chatglm_ptuning.files import write_lines
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.model.modeling_chatglm import ChatGLMPreTrainedModel
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.training.arguments import (
    DataArguments,
    ModelArguments,
    PrefixTrainingArguments,
)
from chatglm_ptuning.training.cost import peak_memory, trained_parameters
from chatglm_ptuning.training.distributed import match_precision
from chatglm_ptuning.training.head_start import start_head
from chatglm_ptuning.training.preservation import (
    GeneralRows,
    PreservationArguments,
    Replay,
    check_preservation,
    drift_report,
    read_general_rows,
)
from chatglm_ptuning.training.report import draw_loss_curve, print_samples
from chatglm_ptuning.training.trainer import PrefixTrainer
from chatglm_ptuning.training.tuning import base_dtype, prefix_length, tuning_of_run
from chatglm_ptuning.tuning.methods import PREFIX_METHODS

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

_SAMPLES_SHOWN = 3


class TrainingRun:
    """One run of the command: what was read, the model, and the steps that the flags ask for.

    Attributes:
        checkpoint: of the same run, to go on from; None to start.
    """

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        args: PrefixTrainingArguments,
        preserve_args: PreservationArguments | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self.checkpoint = checkpoint
        self.preserve_args = preserve_args or PreservationArguments()
        check_preservation(self.preserve_args, args)
        self.output = Path(args.output_dir)
        self.tokenizer: ChatGLMTokenizer = load_tokenizer(
            model_args.model_name_or_path, hub=model_args.hub, revision=model_args.revision
        )
        self.loader = Loader(
            TokenCache(data_args.data_cache_dir, data_args.overwrite_cache),
            data_args.skip_bad_rows,
            args.seed,
            data_args.preprocessing_num_workers,
        )
        # Rows first: what is wrong with a file shows before minutes go into loading the base.
        self.read_data()
        if checkpoint is not None:
            self._check_goes_on(checkpoint)
        self.general = self._read_general_rows()
        self.model = self._load_model()
        self.under_engine = False

    def read_data(self) -> None:
        """Reads what the flags ask for.

        That is the rows `train_examples` and `eval_examples`, the `head` that predicts, the examples that are `tested`,
        and those that are `watched` during training.

        Raises:
            ValueError: naming file and line of what is wrong.
        """
        args = self.args
        self.head: Head = self.make_head()
        self.train_examples = self._rows("train") if args.do_train else []
        self.eval_examples = self._rows("dev") if args.do_eval else []
        self._warn_of_shared_rows()
        self.read_examples()

    def make_head(self) -> Head:
        """What solves the task of the run."""
        flags = self.data_args
        files = flags.train_file or flags.validation_file or flags.test_file or [""]
        return flags.conversation_head(flags.task_of(files), self.tokenizer)

    def split(self, kind: str) -> Split:
        """The rows to train on (`train`), to watch the training by (`dev`), or to predict (`test`).

        Raises:
            ValueError: if the flags do not name them.
        """
        flags = self.data_args
        name, limit = {
            "train": ("train_file", flags.max_train_samples),
            "dev": ("validation_file", flags.max_eval_samples),
            "test": ("test_file" if self.args.do_predict and flags.test_file else "validation_file",
                     flags.max_predict_samples),
        }[kind]  # fmt: skip
        files = getattr(flags, name)
        if not files:
            raise ValueError(f"--{name} is needed for what the flags ask.")
        return Split(files, limit=limit, weights=flags.train_weights if kind == "train" else None)

    def read_examples(self) -> None:
        """Reads the examples that are `tested`, and those that are `watched` during training."""
        args = self.args
        watches = args.do_eval and args.predict_with_generate
        self.tested: Sequence[Example] = self._ready("test") if args.do_predict or watches else []
        self.watched: Sequence[Example] = self.tested if watches else []

    def _check_goes_on(self, checkpoint: Path) -> None:
        """Refuses to go on from what was trained for other tasks, or for other labels of the same."""
        model_args = self.model_args
        recorded = recorded_details(checkpoint, model_args.model_name_or_path, model_args.hub, model_args.revision)
        before, now = tasks_of(recorded), tasks_of(self.details())
        if before != now:
            raise ValueError(
                f"{checkpoint} is of a run on {described_tasks(before)}, and this one is on {described_tasks(now)}: "
                "name another --output_dir, or start anew by --overwrite_output_dir without --resume_from_checkpoint."
            )

    def _read_general_rows(self) -> GeneralRows:
        args, preserve_args = self.args, self.preserve_args
        has_prefix = args.tuning in PREFIX_METHODS
        if preserve_args.preserve_base > 0 and not has_prefix:
            raise ValueError(
                f"--preserve_base needs the base beside what is tuned: --tuning {', '.join(PREFIX_METHODS)}, not "
                f"{args.tuning}."
            )
        tuned = args.do_train or (args.do_eval and self.model_args.ptuning_checkpoint is not None)
        return read_general_rows(
            preserve_args,
            self.tokenizer,
            self.loader,
            replays=args.do_train and preserve_args.preserve_base > 0,
            measures=preserve_args.report_drift and has_prefix and tuned,
        )

    def _rows(self, kind: str) -> datasets.Dataset:
        split = self.split(kind)
        found = self.loader.rows(self.head, split)
        if self.args.should_save:
            print(f"{self.described(split)}\n{found.summary()}")
        return found.rows

    def described(self, split: Split) -> str:
        """Which rows these are, for people."""
        return ", ".join(split.places)

    def _ready(self, kind: str) -> list[Example]:
        return self.loader.make_ready(self.head, self.loader.read(self.head.task, self.split(kind)))[0]

    def _warn_of_shared_rows(self) -> None:
        if not (self.train_examples and self.eval_examples):
            return
        count = shared_rows(self.train_examples, self.eval_examples)
        if count and self.args.should_save:
            print(f"warning: {count} rows of the validation data are in the training data too")

    def _load_model(self) -> ChatGLMPreTrainedModel:
        model_args = self.model_args
        match_precision(self.args, model_args.dtype, model_args.quantization_bit)
        loaded = load_model(
            model_args.model_name_or_path,
            hub=model_args.hub,
            revision=model_args.revision,
            pre_seq_len=prefix_length(self.args, model_args),
            prefix_projection=model_args.prefix_projection,
            prefix_dropout=model_args.prefix_dropout,
            quantization_bit=model_args.quantization_bit,
            quantization_type=model_args.quantization_type,
            dtype=base_dtype(self.args, model_args),
            attn_implementation=model_args.attn_implementation,
            **self.model_settings(),
        )
        model = self.make_model(loaded)
        self.tuning = tuning_of_run(
            model, self.args, model_args, self.tokenizer, self.train_examples, details=self.details()
        )
        if self.data_args.compare_base and not self.tuning.keeps_base:
            raise ValueError(
                "--compare_base needs the plain base, which --tuning full changes: score it in a run of its own, with "
                "--tuning none."
            )
        return model

    def model_settings(self) -> dict[str, Any]:
        """What `load_model` is to be told besides the flags: class and outputs of the head."""
        return self.head.model_settings(self.head.task)

    def make_model(self, loaded: ChatGLMPreTrainedModel) -> ChatGLMPreTrainedModel:
        """The model to train, of the one that was loaded."""
        return loaded

    def trainer(self) -> PrefixTrainer:
        """The Trainer of this run."""
        return PrefixTrainer(
            model=self.model,
            args=self.args,
            train_dataset=self.train_examples or None,
            eval_dataset=self.eval_examples or None,
            data_collator=PaddingCollator(self.tokenizer.pad_token_id, "right"),
            replay=self._replay(),
            tuning=self.tuning,
            details=self.details(),
            generation_metrics=self.score_of_evaluation(),
        )

    def _replay(self) -> Replay | None:
        if self.general.replayed is None:
            return None
        return Replay(
            self.general.replayed,
            self.preserve_args.preserve_base,
            self.tokenizer.pad_token_id,
            batch_size=self.preserve_args.preserve_batch_size,
            seed=self.args.seed,
        )

    def details(self) -> dict[str, Any]:
        """What the prefix checkpoint records of this run."""
        return {
            "chat_format": self.tokenizer.chat_format,
            "task": self.data_args.train_file and Path(self.data_args.train_file[0]).stem,
            "training": {
                "tuning": self.args.tuning,
                "rows": len(self.train_examples),
                "learning_rate": self.args.learning_rate,
                "prefix_init": self.model_args.init_prefix or self.model_args.prefix_init,
                "seed": self.args.seed,
            },
        }

    def score_of_evaluation(self) -> Callable[[], dict[str, float]] | None:
        """What gives an evaluation its scores besides the loss."""
        return self._score_watched if self.watched else None

    def _score_watched(self) -> dict[str, float]:
        settings = inference_settings(self.data_args, self.args)
        found = predict(self.model, self.head, self.watched, settings, under_engine=self.under_engine)
        return score_task(self.head.task, self.watched, found).metrics

    def init_head(self, trainer: PrefixTrainer) -> None:
        """Gives a linear head that is still random the values that --head_init asks for."""
        count = start_head(
            self.model,
            self.train_examples,
            trainer.data_collator,
            head_init=self.args.head_init,
            batch_size=self.args.per_device_eval_batch_size,
            seed=self.args.seed,
        )
        if self.args.should_save and count:
            print(f"The linear head starts from a logistic regression on {count} states (--head_init probe).")

    def train(self, trainer: PrefixTrainer) -> None:
        """Trains, saves the prefix into the run's folder, and draws the loss; a run that had finished is left so."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            self.init_head(trainer)
        self.under_engine = self.args.deepspeed is not None
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model()
        if trainer.steps_done:
            metrics = dict(result.metrics, train_samples=len(self.train_examples))
            metrics |= trained_parameters(self.model) | peak_memory()
            if losses:
                metrics["final_loss"] = losses[-1]
            self.keep("train", metrics, trainer)
        else:
            logger.warning(
                f"{checkpoint} has all of the {trainer.state.max_steps} steps of this run: nothing was left to train. "
                "A larger --max_steps or --num_train_epochs trains on, --overwrite_output_dir without "
                "--resume_from_checkpoint starts anew."
            )
        trainer.save_state()
        if self.args.should_save:
            draw_loss_curve(trainer.state.log_history, self.output / "loss.png")

    def evaluate(self, trainer: PrefixTrainer) -> None:
        """Loss on the validation rows, and with --predict_with_generate the scores of generated answers."""
        metrics = trainer.last_evaluation()
        self.under_engine = trainer.deepspeed is not None
        self.keep("eval", metrics, trainer)

    def measure_drift(self, trainer: PrefixTrainer) -> None:
        """How far the prefix has moved the model from its base on general rows."""
        metrics = drift_report(
            self.model,
            self.general.held_out,
            self.tokenizer,
            self.args.per_device_eval_batch_size,
            under_engine=self.under_engine,
        )
        if self.args.do_train:
            metrics["preserve_base"] = self.preserve_args.preserve_base
        self.keep("general", metrics, trainer)

    def predict(self, trainer: PrefixTrainer) -> None:
        """Predicts the test rows, writes the files about them, and compares with the base if asked to."""
        labelled = has_gold(self.tested)
        predictions = predict_beside_base(
            self.tuning,
            self.tuning.described,
            self.head,
            self.tested,
            inference_settings(self.data_args, self.args),
            with_base=self.data_args.compare_base and self.tuning.method != "none" and labelled,
            under_engine=self.under_engine,
        )
        scores = {}
        if labelled:
            task = self.head.task
            scores = {name: score_task(task, self.tested, own).metrics for name, own in predictions.items()}
        metrics: dict[str, Any] = {"predict_samples": len(self.tested)}
        for prefix, of_model in zip(("predict", "base"), reversed(scores.values()), strict=False):
            metrics |= {f"{prefix}_{name}": value for name, value in of_model.items()}
        if not self.args.should_save:
            return
        self.write_predictions(predictions)
        # Last: whoever finds the scores counts on the files about them.
        self.keep("predict", metrics, trainer)
        if scores:
            print_scores(scores)

    def write_predictions(self, predictions: Mapping[str, Sequence[Prediction]]) -> None:
        """Writes the answers as the official script does, and shows some.

        Args:
            predictions: of each model; of what is tuned the last.
        """
        texts = {name: [prediction.value for prediction in own] for name, own in predictions.items()}
        references = [example.reference for example in self.tested]
        rows = [
            {"labels": reference, "predict": answer}
            for reference, answer in zip(references, list(texts.values())[-1], strict=True)
        ]
        write_lines(self.output / "generated_predictions.txt", rows)
        shown = slice(0, _SAMPLES_SHOWN)
        prompts = [
            self.tokenizer.decode(example.prompt_ids, skip_special_tokens=True) for example in self.tested[shown]
        ]
        print_samples(prompts, references[shown], {name: answers[shown] for name, answers in texts.items()})

    def keep(self, split: str, metrics: dict[str, Any], trainer: PrefixTrainer) -> None:
        """Logs the metrics, and writes them into `SPLIT_results.json` and `all_results.json`."""
        if self.args.should_save:
            trainer.log_metrics(split, metrics)
            trainer.save_metrics(split, metrics)


def inference_settings(flags: DataArguments, args: PrefixTrainingArguments) -> InferenceSettings:
    """How the flags want predictions to be made."""
    return InferenceSettings(
        batch_size=args.per_device_eval_batch_size,
        max_new_tokens=flags.val_max_target_length or flags.max_target_length,
        num_beams=flags.num_beams or args.generation_num_beams or 1,
    )
