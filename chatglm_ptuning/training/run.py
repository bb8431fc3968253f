"""`chatglm-ptuning train`: from files to a prefix, its scores and its report."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.data.files import BadRows, Row, iterate_rows
from chatglm_ptuning.data.prepared import prepare_training_data, shared_rows
from chatglm_ptuning.data.preprocess import Preprocessor
from chatglm_ptuning.data.token_cache import TokenCache
from chatglm_ptuning.evaluation.metrics import score
from chatglm_ptuning.evaluation.parallel import generate_answers_together
from chatglm_ptuning.evaluation.table import print_scores
from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.prefix.checkpoint import read_prefix
from chatglm_ptuning.prefix.files import write_atomically
from chatglm_ptuning.training.arguments import (
    DEFAULT_PRE_SEQ_LEN,
    RETIRED_FLAGS,
    DataArguments,
    ModelArguments,
    PrefixTrainingArguments,
)
from chatglm_ptuning.training.checkpoints import is_whole, last_checkpoint
from chatglm_ptuning.training.distributed import from_first_process, match_precision
from chatglm_ptuning.training.failures import (
    SIGTERM_EXIT_CODE,
    Preempted,
    ProcessLost,
    TrainingStopped,
    is_lost_process,
    is_out_of_memory,
    what_is_kept,
)
from chatglm_ptuning.training.initialisation import init_prefix
from chatglm_ptuning.training.preservation import (
    PreservationArguments,
    Replay,
    check_preservation,
    drift_report,
    read_general_rows,
)
from chatglm_ptuning.training.report import draw_loss_curve, print_samples
from chatglm_ptuning.training.trainer import PrefixTrainer

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

_SAMPLES_SHOWN = 3


class TrainingRun:
    """One run of the command: what was read, the model, and the steps that the flags ask for."""

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: DataArguments,
        preserve_args: PreservationArguments,
        args: PrefixTrainingArguments,
    ) -> None:
        self.model_args, self.data_args, self.preserve_args, self.args = model_args, data_args, preserve_args, args
        check_preservation(preserve_args, args)
        self.output = Path(args.output_dir)
        self.tokenizer: ChatGLMTokenizer = load_tokenizer(
            model_args.model_name_or_path, hub=model_args.hub, revision=model_args.revision
        )
        self.preprocessor = Preprocessor(
            self.tokenizer,
            data_args.columns(),
            data_args.max_source_length,
            data_args.max_target_length,
            source_prefix=data_args.source_prefix,
            num_workers=data_args.preprocessing_num_workers,
        )
        # Rows first: what is wrong with a file shows before minutes go into loading the base.
        self.cache = TokenCache(data_args.data_cache_dir, data_args.overwrite_cache)
        self.train_examples = self._examples("train_file", data_args.max_train_samples) if args.do_train else []
        self.eval_examples = self._examples("validation_file", data_args.max_eval_samples) if args.do_eval else []
        self._warn_of_shared_rows()
        self.test_rows = self._test_rows()
        self.general = read_general_rows(
            preserve_args,
            self.tokenizer,
            self.cache,
            replays=args.do_train and preserve_args.preserve_base > 0,
            measures=preserve_args.report_drift
            and (args.do_train or (args.do_eval and model_args.ptuning_checkpoint is not None)),
        )
        self.model = self._load_model()
        self._under_engine = False

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
        pre_seq_len = (model_args.pre_seq_len or DEFAULT_PRE_SEQ_LEN) if trains else None
        model = load_model(
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
        )
        if model_args.ptuning_checkpoint is not None:
            self._check_wanted_length(model)
            model.load_prefix(model_args.ptuning_checkpoint)
        elif trains:
            init_prefix(
                model,
                self.tokenizer,
                model_args.prefix_init,
                text=model_args.init_prefix_text,
                examples=self.train_examples,
                seed=self.args.seed,
            )
        elif model_args.pre_seq_len:
            raise ValueError(
                f"--pre_seq_len {model_args.pre_seq_len} without --do_train needs a --ptuning_checkpoint: an untrained "
                "prefix is random. Without --pre_seq_len the plain base is used."
            )
        return model

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
        details = {
            "chat_format": self.tokenizer.chat_format,
            "task": self.data_args.train_file and Path(self.data_args.train_file[0]).stem,
            "training": {
                "rows": len(self.train_examples),
                "learning_rate": self.args.learning_rate,
                "prefix_init": self.model_args.prefix_init,
                "seed": self.args.seed,
            },
        }
        wants_answers = self.args.predict_with_generate and self.args.do_eval
        return PrefixTrainer(
            model=self.model,
            args=self.args,
            train_dataset=self.train_examples or None,
            eval_dataset=self.eval_examples or None,
            data_collator=PaddingCollator(self.tokenizer.pad_token_id, "right"),
            details=details,
            generation_metrics=(lambda: self.answer_and_score()[1]) if wants_answers else None,
            replay=self._replay(),
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

    def train(self, trainer: PrefixTrainer, checkpoint: Path | None) -> None:
        """Trains, saves the prefix into the run's folder, and draws the loss."""
        self._under_engine = self.args.deepspeed is not None
        result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trainer.save_model()
        metrics = dict(result.metrics, train_samples=len(self.train_examples))
        if losses:
            metrics["final_loss"] = losses[-1]
        self._keep("train", metrics, trainer)
        trainer.save_state()
        if self.args.should_save:
            draw_loss_curve(trainer.state.log_history, self.output / "loss.png")

    def evaluate(self, trainer: PrefixTrainer) -> None:
        """Loss on the validation rows, and with --predict_with_generate the scores of generated answers."""
        metrics = trainer.evaluate()
        self._under_engine = trainer.deepspeed is not None
        self._keep("eval", metrics, trainer)

    def measure_drift(self, trainer: PrefixTrainer) -> None:
        """How far the prefix has moved the model from its base on general rows."""
        metrics = drift_report(
            self.model,
            self.general.held_out,
            self.tokenizer,
            self.args.per_device_eval_batch_size,
            under_engine=self._under_engine,
        )
        if self.args.do_train:
            metrics["preserve_base"] = self.preserve_args.preserve_base
        self._keep("general", metrics, trainer)

    def answer_and_score(self) -> tuple[list[str], dict[str, float]]:
        """Answers to the test rows under the selected prefix, and their scores."""
        examples, _ = self.preprocessor.for_generation(self.test_rows, BadRows(self.data_args.skip_bad_rows))
        answers = generate_answers_together(
            self.model,
            self.tokenizer,
            examples,
            under_engine=self._under_engine,
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
        self._keep("predict", metrics | {"predict_samples": len(examples)}, trainer)
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

    def _keep(self, split: str, metrics: dict[str, Any], trainer: PrefixTrainer) -> None:
        if self.args.should_save:
            trainer.log_metrics(split, metrics)
            trainer.save_metrics(split, metrics)


def prepare_output(args: PrefixTrainingArguments) -> Path | None:
    """Decides what an output folder with an earlier run in it means; returns the checkpoint to go on from.

    As the official script does, a run goes on from its last checkpoint unless --overwrite_output_dir is given. A job
    that torchrun or Slurm has started again goes on in any case. The first process decides for all.

    Raises:
        ValueError: if there is nothing to resume from though it was asked for, or not on this machine.
    """
    fault, chosen = None, None
    if args.process_index == 0:
        try:
            chosen = _choose_checkpoint(args)
        except ValueError as error:
            fault = str(error)
    fault, chosen = from_first_process((fault, chosen))
    if fault is not None:
        raise ValueError(fault)
    if chosen is not None and not is_whole(chosen):
        raise ValueError(
            f"The first process goes on from {chosen}, which process {args.process_index} does not see: --output_dir "
            "must be on storage that all machines share."
        )
    return chosen


def _choose_checkpoint(args: PrefixTrainingArguments) -> Path | None:
    output = Path(args.output_dir)
    newest = last_checkpoint(output)
    if _was_restarted():
        logger.warning(f"The job was started again; going on from {newest or 'the beginning'}.")
        return newest if args.do_train else None
    if args.resume_from_checkpoint:
        wanted = args.resume_from_checkpoint
        if str(wanted).lower() in ("true", "1"):
            if newest is None:
                raise ValueError(f"--resume_from_checkpoint: {output} holds no whole checkpoint.")
            return newest
        if not is_whole(wanted):
            raise ValueError(f"--resume_from_checkpoint: {wanted} is not a whole checkpoint of a run.")
        return Path(wanted)
    if not args.do_train or newest is None:
        return None
    if args.overwrite_output_dir:
        for folder in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(folder)
        return None
    logger.warning(f"Going on from {newest}; give --overwrite_output_dir to start anew.")
    return newest


def _was_restarted() -> bool:
    """Whether torchrun (`--max-restarts`) or Slurm (requeueing) has started the same command again."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def main(argv: Sequence[str]) -> None:
    """Entry of the command; errors that users can mend end it with a message and exit code 1, SIGTERM with 143."""
    model_args, data_args, preserve_args, args = parse_arguments(
        "chatglm-ptuning train",
        "Train a P-Tuning v2 prefix, evaluate it, and generate with it.",
        (ModelArguments, DataArguments, PreservationArguments, PrefixTrainingArguments),
        argv,
        RETIRED_FLAGS,
    )
    if not (args.do_train or args.do_eval or args.do_predict):
        fail("nothing to do: give --do_train, --do_eval or --do_predict.")
    set_seed(args.seed)
    level = logging.WARNING if args.should_save else logging.ERROR  # one process speaks for all
    logging.set_verbosity(level)
    logging.get_logger(__name__.partition(".")[0]).setLevel(level)
    try:
        output = _run(model_args, data_args, preserve_args, args)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(SIGTERM_EXIT_CODE) from stop
    except (ValueError, OSError, ImportError, TrainingStopped) as error:
        fail(str(error))
    except Exception as error:
        if args.world_size > 1 and is_lost_process(error):
            fail(str(ProcessLost(error, args)))
        if is_out_of_memory(error):
            fail(
                f"Out of memory on {args.device}: {error} {what_is_kept(args)} Try smaller batches "
                "(--per_device_train_batch_size, --per_device_eval_batch_size), --gradient_checkpointing, or "
                "--quantization_bit 4."
            )
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if args.should_save:
        print(f"Everything of this run is in {output}.")


def _run(
    model_args: ModelArguments,
    data_args: DataArguments,
    preserve_args: PreservationArguments,
    args: PrefixTrainingArguments,
) -> Path:
    checkpoint = prepare_output(args)
    run = TrainingRun(model_args, data_args, preserve_args, args)
    trainer = run.trainer()
    if args.do_train:
        run.train(trainer, checkpoint)
    if args.do_eval:
        run.evaluate(trainer)
    if args.do_predict:
        run.predict(trainer)
    if run.general.held_out is not None:
        run.measure_drift(trainer)
    return run.output
