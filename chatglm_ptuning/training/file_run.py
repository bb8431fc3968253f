"""A run on data files: what was read, the model, and the steps that the flags ask for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.files import BadRows, Row, iterate_rows
from chatglm_ptuning.data.prepared import prepare_training_data, shared_rows
from chatglm_ptuning.data.preprocess import Preprocessor
from chatglm_ptuning.data.token_cache import TokenCache
from chatglm_ptuning.evaluation.metrics import score
from chatglm_ptuning.evaluation.parallel import generate_answers_together
from chatglm_ptuning.evaluation.table import print_scores
from chatglm_ptuning.evaluation.task_model import recorded_metadata
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMPreTrainedModel
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.checkpoint import read_prefix
from chatglm_ptuning.prefix.files import write_atomically
from chatglm_ptuning.training.arguments import (
    DEFAULT_PRE_SEQ_LEN,
    DataArguments,
    ModelArguments,
    PrefixTrainingArguments,
)
from chatglm_ptuning.training.distributed import match_precision
from chatglm_ptuning.training.initialisation import init_from_checkpoint, init_prefix
from chatglm_ptuning.training.report import draw_loss_curve, print_samples
from chatglm_ptuning.training.trainer import PrefixTrainer

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

_SAMPLES_SHOWN = 3


class TrainingRun:
    """One run of the command: what was read, the model, and the steps that the flags ask for."""

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, args: PrefixTrainingArguments) -> None:
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self.output = Path(args.output_dir)
        self.tokenizer: ChatGLMTokenizer = load_tokenizer(
            model_args.model_name_or_path, hub=model_args.hub, revision=model_args.revision
        )
        # Rows first: what is wrong with a file shows before minutes go into loading the base.
        self.read_data()
        self.model = self._load_model()
        self.under_engine = False

    def read_data(self) -> None:
        """Reads what the flags ask for: `train_examples` and `eval_examples`, and what is to be predicted.

        Raises:
            ValueError: naming file and line of what is wrong.
        """
        data_args, args = self.data_args, self.args
        self.preprocessor = Preprocessor(
            self.tokenizer,
            data_args.columns(),
            data_args.max_source_length,
            data_args.max_target_length,
            source_prefix=data_args.source_prefix,
            num_workers=data_args.preprocessing_num_workers,
        )
        self.cache = TokenCache(data_args.data_cache_dir, data_args.overwrite_cache)
        self.train_examples = self._examples("train_file", data_args.max_train_samples) if args.do_train else []
        self.eval_examples = self._examples("validation_file", data_args.max_eval_samples) if args.do_eval else []
        self._warn_of_shared_rows()
        self.test_rows = self._test_rows()

    def _named(self, flag: str) -> list[str]:
        names = getattr(self.data_args, flag)
        if not names:
            raise ValueError(f"--{flag} is needed for what the flags ask.")
        return names

    def _examples(self, flag: str, limit: int | None) -> datasets.Dataset:
        names = self._named(flag)
        data = prepare_training_data(
            names,
            self.preprocessor,
            self.cache,
            weights=self.data_args.train_weights if flag == "train_file" else None,
            max_rows=limit,
            skip_bad_rows=self.data_args.skip_bad_rows,
            seed=self.args.seed,
        )
        if self.args.should_save:
            print(f"{', '.join(names)}\n{data.summary()}")
        return data.examples

    def _warn_of_shared_rows(self) -> None:
        if not (self.train_examples and self.eval_examples):
            return
        count = shared_rows(self.train_examples, self.eval_examples)
        if count and self.args.should_save:
            print(f"warning: {count} rows of the validation data are in the training data too")

    def _test_rows(self) -> list[Row]:
        if not self.args.do_predict and not (self.args.do_eval and self.args.predict_with_generate):
            return []
        flag = "test_file" if self.args.do_predict and self.data_args.test_file else "validation_file"
        rows = iterate_rows(self._named(flag), BadRows(self.data_args.skip_bad_rows))
        return list(itertools.islice(rows, self.data_args.max_predict_samples))

    def _load_model(self) -> ChatGLMForConditionalGeneration:
        model_args, trains = self.model_args, self.args.do_train
        match_precision(self.args, model_args.dtype, model_args.quantization_bit)
        pre_seq_len = self._wanted_length() if trains else None
        loaded = load_model(
            model_args.model_name_or_path,
            hub=model_args.hub,
            revision=model_args.revision,
            pre_seq_len=pre_seq_len,
            prefix_projection=model_args.prefix_projection,
            prefix_dropout=model_args.prefix_dropout,
            quantization_bit=model_args.quantization_bit,
            quantization_type=model_args.quantization_type,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            **self.model_settings(),
        )
        model = self.make_model(loaded)
        if model_args.ptuning_checkpoint is not None:
            self._check_wanted_length(model)
            self.load_checkpoint(model)
        elif trains and model_args.init_prefix is not None:
            self.start_from(model, model_args.init_prefix)
        elif trains:
            init_prefix(
                model,
                self.tokenizer,
                model_args.prefix_init,
                text=model_args.init_prefix_text,
                examples=self.train_examples,
                seed=self.args.seed,
            )
        elif model_args.init_prefix is not None:
            raise ValueError("--init_prefix is what a training starts from: give --do_train, or --ptuning_checkpoint.")
        elif model_args.pre_seq_len:
            raise ValueError(
                f"--pre_seq_len {model_args.pre_seq_len} without --do_train needs a --ptuning_checkpoint: an untrained "
                "prefix is random. Without --pre_seq_len the plain base is used."
            )
        return model

    def model_settings(self) -> dict[str, Any]:
        """What `load_model` is to be told besides the flags: class and outputs of a linear head."""
        return {}

    def make_model(self, loaded: ChatGLMPreTrainedModel) -> ChatGLMPreTrainedModel:
        """The model to train, of the one that was loaded."""
        return loaded

    def load_checkpoint(self, model: ChatGLMPreTrainedModel) -> None:
        """Loads what --ptuning_checkpoint names, to go on from or to evaluate."""
        model.load_prefix(self.model_args.ptuning_checkpoint)

    def start_from(self, model: ChatGLMPreTrainedModel, prefix: str) -> None:
        """Gives the trainable prefix its first values from what --init_prefix names."""
        init_from_checkpoint(model, prefix)
        if self.args.should_save:
            print(f"The prefix starts from {prefix}.")

    def _wanted_length(self) -> int:
        model_args = self.model_args
        if model_args.init_prefix is None:
            return model_args.pre_seq_len or DEFAULT_PRE_SEQ_LEN
        base = (model_args.model_name_or_path, model_args.hub, model_args.revision)
        found = recorded_metadata(model_args.init_prefix, *base).pre_seq_len
        if model_args.pre_seq_len not in (None, found):
            raise ValueError(
                f"--pre_seq_len is {model_args.pre_seq_len}, but --init_prefix {model_args.init_prefix} "
                f"has {found} virtual tokens. Leave --pre_seq_len out: the size is read from the checkpoint."
            )
        return found

    def _check_wanted_length(self, model: ChatGLMForConditionalGeneration) -> None:
        wanted, path = self.model_args.pre_seq_len, self.model_args.ptuning_checkpoint
        found = read_prefix(path, model.config).metadata.pre_seq_len
        if wanted is not None and found != wanted:
            raise ValueError(
                f"--pre_seq_len is {wanted}, but the prefix in {path} has {found} virtual tokens. Leave --pre_seq_len "
                "out: the size is read from the checkpoint."
            )

    def trainer(self) -> PrefixTrainer:
        """The Trainer of this run."""
        return PrefixTrainer(
            model=self.model,
            args=self.args,
            train_dataset=self.train_examples or None,
            eval_dataset=self.eval_examples or None,
            data_collator=PaddingCollator(self.tokenizer.pad_token_id, "right"),
            details=self.details(),
            generation_metrics=self.score_of_evaluation(),
        )

    def details(self) -> dict[str, Any]:
        """What the prefix checkpoint records of this run."""
        return {
            "chat_format": self.tokenizer.chat_format,
            "task": self.data_args.train_file and Path(self.data_args.train_file[0]).stem,
            "training": {
                "rows": len(self.train_examples),
                "learning_rate": self.args.learning_rate,
                "prefix_init": self.model_args.init_prefix or self.model_args.prefix_init,
                "seed": self.args.seed,
            },
        }

    def score_of_evaluation(self) -> Callable[[], dict[str, float]] | None:
        """What gives an evaluation its scores besides the loss."""
        wants_answers = self.args.predict_with_generate and self.args.do_eval
        return (lambda: self.answer_and_score()[1]) if wants_answers else None

    def train(self, trainer: PrefixTrainer, checkpoint: Path | None) -> None:
        """Trains, saves the prefix into the run's folder, and draws the loss."""
        self.under_engine = self.args.deepspeed is not None
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model()
        metrics = dict(result.metrics, train_samples=len(self.train_examples))
        if losses:
            metrics["final_loss"] = losses[-1]
        self.keep("train", metrics, trainer)
        trainer.save_state()
        if self.args.should_save:
            draw_loss_curve(trainer.state.log_history, self.output / "loss.png")

    def evaluate(self, trainer: PrefixTrainer) -> None:
        """Loss on the validation rows, and with --predict_with_generate the scores of generated answers."""
        metrics = trainer.evaluate()
        self.under_engine = trainer.deepspeed is not None
        self.keep("eval", metrics, trainer)

    def answer_and_score(self) -> tuple[list[str], dict[str, float]]:
        """Answers to the test rows under the selected prefix, and their scores."""
        examples, _ = self.preprocessor.for_generation(self.test_rows, BadRows(self.data_args.skip_bad_rows))
        answers = generate_answers_together(
            self.model,
            self.tokenizer,
            examples,
            under_engine=self.under_engine,
            batch_size=self.args.per_device_eval_batch_size,
            max_new_tokens=self.data_args.val_max_target_length or self.data_args.max_target_length,
            num_beams=self.data_args.num_beams or self.args.generation_num_beams or 1,
        )
        return answers, score(answers, [example["reference"] for example in examples])

    def predict(self, trainer: PrefixTrainer) -> None:
        """Generates answers, writes them as the official script does, and compares with the base if asked to."""
        examples, _ = self.preprocessor.for_generation(self.test_rows, BadRows(self.data_args.skip_bad_rows))
        answers, scores = self.answer_and_score()
        columns, texts = {"with prefix": scores}, {"with prefix": answers}
        metrics = {f"predict_{name}": value for name, value in scores.items()}
        if self.data_args.compare_base and self.model.selected_prefix is not None:
            selected = self.model.selected_prefix
            self.model.set_prefix(None)
            try:
                base_answers, base_scores = self.answer_and_score()
            finally:
                self.model.set_prefix(selected)
            columns = {"base": base_scores, **columns}
            texts = {"base": base_answers, **texts}
            metrics |= {f"base_{name}": value for name, value in base_scores.items()}
        self.keep("predict", metrics | {"predict_samples": len(examples)}, trainer)
        if not self.args.should_save:
            return
        references = [example["reference"] for example in examples]
        lines = [
            json.dumps({"labels": reference, "predict": answer}, ensure_ascii=False)
            for reference, answer in zip(references, answers, strict=True)
        ]
        with write_atomically(self.output / "generated_predictions.txt") as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print_scores(columns)
        shown = slice(0, _SAMPLES_SHOWN)
        prompts = [self.tokenizer.decode(example["input_ids"], skip_special_tokens=True) for example in examples[shown]]
        print_samples(prompts, references[shown], {name: answer[shown] for name, answer in texts.items()})

    def keep(self, split: str, metrics: dict[str, Any], trainer: PrefixTrainer) -> None:
        """Logs the metrics, and writes them into `SPLIT_results.json` and `all_results.json`."""
        if self.args.should_save:
            trainer.log_metrics(split, metrics)
            trainer.save_metrics(split, metrics)
