"""The flags of transformers' TrainingArguments that are refused here, each with what to use instead.

All others do what transformers says; docs/training_flags.md lists every one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from transformers import Seq2SeqTrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

Optimizer = Literal[
    "adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop",
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
]  # fmt: skip
"""Those that are tested; from the second line on they need bitsandbytes. The rest of transformers' list works on the
gradients of linear layers only, keeps other weights than it trains, or needs a package that is not tested here."""
_OF_TORCH = get_args(Optimizer)[:6]

_NO_COMPUTED_METRICS = (
    "an evaluation computes the loss, and scores predictions with the metrics of the task. Leave it out."
)
_NO_UPLOAD = "the kit does not upload. Leave it out, and upload the finished run by `hf upload OWNER/NAME OUTPUT_DIR`."
_DTYPE = "the base is evaluated in the type that it is trained in: set it by --dtype bfloat16 or float16."
_SHARDING = "use --deepspeed ds_config/zero3.json to partition a base that does not fit one GPU."

REFUSED = {
    "optim_args": "choose another --optim, or set --adam_beta1, --adam_beta2, --adam_epsilon and --weight_decay.",
    "optim_target_modules": "what is trained is chosen by --tuning, and for LoRA by --lora_target.",
    "average_tokens_across_devices": "the loss is always the mean over the tokens of all processes. Leave it out.",
    "bf16_full_eval": _DTYPE,
    "fp16_full_eval": _DTYPE,
    "use_liger_kernel": "it has no kernels for ChatGLM. Use --attn_implementation and --torch_compile for speed.",
    "liger_kernel_config": "it has no kernels for ChatGLM. Use --attn_implementation and --torch_compile for speed.",
    "use_cache": "training needs no cache, and generation always uses one. Leave it out.",
    "prediction_loss_only": "an evaluation on instruction files generates answers only with --predict_with_generate. "
    "Leave it out.",
    "eval_do_concat_batches": _NO_COMPUTED_METRICS,
    "eval_use_gather_object": _NO_COMPUTED_METRICS,
    "include_for_metrics": _NO_COMPUTED_METRICS,
    "batch_eval_metrics": _NO_COMPUTED_METRICS,
    "save_on_each_node": "the first process writes for all: put --output_dir on storage that all machines share.",
    "enable_jit_checkpoint": "SIGTERM always saves a checkpoint. Leave it out.",
    "push_to_hub": _NO_UPLOAD,
    "hub_token": _NO_UPLOAD,
    "hub_private_repo": _NO_UPLOAD,
    "hub_model_id": _NO_UPLOAD,
    "hub_strategy": _NO_UPLOAD,
    "hub_always_push": _NO_UPLOAD,
    "hub_revision": _NO_UPLOAD,
    "ignore_data_skip": "a resumed run skips rows without reading them, and sees the same rows as one that was never "
    "interrupted. Leave it out.",
    "restore_callback_states_from_checkpoint": "no callback of the kit has a state. Leave it out.",
    "accelerator_config": "the kit distributes batches itself. Set --per_device_train_batch_size and "
    "--gradient_accumulation_steps.",
    "parallelism_config": _SHARDING,
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "dataloader_in_order": "a run must see its rows in the same order again when it resumes. Leave it out.",
    "label_names": "the labels follow from the task and its --head. Leave it out.",
    "length_column_name": "the kit counts the tokens itself. Leave it out.",
    "generation_max_length": "set the number of tokens to generate by --val_max_target_length.",
    "generation_config": "predictions are greedy, or by beam search with --num_beams.",
}
"""Flag -> what to use instead. A flag that is given with its default value is accepted."""

_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}
_MODULES = {
    "azure_ml": ("azureml",), "flyte": ("flytekit",), "kubeflow": (), "tensorboard": ("tensorboard", "tensorboardX"),
}  # fmt: skip
"""Where package or module of an experiment tracker are not called as transformers calls the tracker."""
_MANY_STEPS = 1_000_000
"""Stands for the number of steps of a run of epochs, which is known when its rows are read."""
_BELOW = {
    "learning_rate": math.inf, "weight_decay": math.inf, "adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1,
    "dataloader_num_workers": math.inf,
}  # fmt: skip
"""Flags whose values are at least 0 -> what they are below."""
_OFF = ("", "none", "false", "no", "0")


def check_given(args: Seq2SeqTrainingArguments) -> None:
    """Refuses what does not work here, before transformers has changed the values that were given.

    Raises:
        ValueError: naming the flag and what to use instead.
    """
    for field in dataclasses.fields(Seq2SeqTrainingArguments):
        if field.name in REFUSED and _is_changed(getattr(args, field.name), field):
            raise ValueError(f"--{field.name} is refused: {REFUSED[field.name]}")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name, end in _BELOW.items():
        value = getattr(args, name)
        if value is not None and not 0 <= value < end:
            limit = "finite" if end == math.inf else f"below {end}"
            raise ValueError(f"--{name} must be at least 0 and {limit}, got {value:g}")
    if args.adam_epsilon <= 0:
        raise ValueError(f"--adam_epsilon must be above 0, got {args.adam_epsilon:g}")
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ValueError(f"--{name} must be at least 0 and below 2**32, got {getattr(args, name)}")
    for name in ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        _check_mapping(name, getattr(args, name))
    if args.do_train and (args.max_steps == 0 or args.max_steps < -1):
        raise ValueError(
            f"--max_steps must be at least 1, got {args.max_steps}. Leave it out to train for --num_train_epochs."
        )
    if args.do_train and args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"--num_train_epochs must be above 0 and finite, got {args.num_train_epochs:g}")
    if args.ddp_backend and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"--ddp_backend {args.ddp_backend} is for several processes, which scripts/launch.sh starts. Leave it out."
        )
    if "tpu_metrics_debug" in str(args.debug):
        raise ValueError("--debug tpu_metrics_debug is refused: there is no support for TPUs.")


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, str):
        return
    try:
        is_mapping = isinstance(json.loads(value), dict)
    except json.JSONDecodeError:
        is_mapping = False
    if not is_mapping:
        raise ValueError(f"--{name} must be a mapping in JSON, such as '{{\"name\": 1}}', got {value}")


def _is_changed(value: Any, field: dataclasses.Field) -> bool:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if value == default:
        return False
    is_off = str(value).lower() in _OFF if isinstance(value, str) else not value
    return not (is_off and not default)


def check_resolved(args: Seq2SeqTrainingArguments) -> None:
    """Refuses what this machine or the chosen schedule lacks, when transformers has read all values.

    Raises:
        ValueError: naming the flag and what is missing.
    """
    if args.fp16 and args.device.type == "cpu" and not args.deepspeed:
        raise ValueError("--fp16 needs a GPU. Leave it out, or use --bf16 true --use_cpu true.")
    if args.do_train:
        _check_optimizer(args)
        _check_schedule(args)
    for name in args.report_to:
        _check_tracker(name)
    for name in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        if getattr(args, name) and "trackio" not in args.report_to:
            raise ValueError(f"--{name} belongs to --report_to trackio: give that too, or leave it out.")


def _check_optimizer(args: Seq2SeqTrainingArguments) -> None:
    name = args.optim.value
    if name not in get_args(Optimizer):
        raise ValueError(f"--optim must be one of {', '.join(get_args(Optimizer))}, got {name}")
    if name not in _OF_TORCH:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise ValueError(f"--optim {name} needs bitsandbytes: pip install bitsandbytes.") from error


def _check_schedule(args: Seq2SeqTrainingArguments) -> None:
    """Makes the schedule: it knows which of its settings are missing or wrong."""
    steps = args.max_steps if args.max_steps > 0 else _MANY_STEPS
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value} does not work with --lr_scheduler_kwargs "
            f"{args.lr_scheduler_kwargs} and --learning_rate {args.learning_rate:g}: {error}"
        ) from error


def _check_tracker(name: str) -> None:
    if name not in INTEGRATION_TO_CALLBACK:
        raise ValueError(
            f"--report_to takes none, all (every tracker that is installed), or some of "
            f"{', '.join(INTEGRATION_TO_CALLBACK)}; got {name}"
        )
    modules = _MODULES.get(name, (name,))
    if modules and not any(find_spec(module) for module in modules):
        raise ValueError(
            f"--report_to {name} needs a package that is not installed: pip install {_PACKAGES.get(name, name)}. "
            "Without --report_to, the losses are in progress.jsonl and loss.png."
        )
    try:
        INTEGRATION_TO_CALLBACK[name]()
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"--report_to {name} cannot be used here: {error}") from error
