"""Other names of keys: old ones, which are refused with the new name, and those that other programs use."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterator

_VIEWS = {
    "jitter": "color_jitter", "grey": "grayscale", "solarise": "solarize", "blur": "gaussian_blur", "flip": "horizontal_flip",
    "restyle": "amplitude_mix",
}  # fmt: skip
# An entry also holds for the keys below it (`unlabelled.weight`) and, with two parts, wherever the model stands (`regime.optim.clip`).
# Entries may follow one another. Where the new key takes other values, an entry has one as an example: `new.key=value`.
RENAMED_KEYS: dict[str, str] = {
    **{
        f"{at}.{old}": f"{at}.{new}"
        for at in ("transform", "second_view", "local_views")
        for old, new in _VIEWS.items()
    },
    "data.licence": "data.license",
    "domain.forwards": "domain.joint_forward=false",
    "downstream.proposals": "downstream.rpn_post_nms_top_n",
    "downstream.sampled": "downstream.box_batch_size_per_image",
    "pretext.off_diagonal": "pretext.lambda_param",
    "pretext.invariance": "pretext.sim_coeff",
    "pretext.variance": "pretext.std_coeff",
    "pretext.covariance": "pretext.cov_coeff",
    "unlabelled": "unlabeled",
    "views": "transform",
    "transform.count": "transform.num_views",
    "transform.second": "transform.second_view",
    "transform.local": "transform.local_views",
    "unlabeled.views": "unlabeled.transform",
    "batch.size": "batch_size",
    "batch.micro": "micro_batch_size",
    "batch": "batch_size",
    "workers": "num_workers",
    "keep_checkpoints": "save_total_limit",
    "checkpoint_every": "save_every",
    "initialisation": "init",
    "initialisations": "encoders",
    "data.dev": "data.val",
    "data.dev_path": "data.val_path",
    "data.dev_split": "data.val_split",
    "data.bad_files": "data.max_bad_files",
    "data.on_unreadable": "data.on_error",
    "data.held_images": "data.max_val_images",
    "data.shuffle": "data.shuffle_buffer",
    "tracking.pictures": "tracking.log_images",
    "tracking.mirrors": "tracking.loggers",
    "tracking.terminal": "tracking.progress",
    "regime.statistics": "regime.freeze_bn_stats=true",
    "regime.decays": "regime.weight_decays",
    "regime.batch": "regime.batch_size",
    "regime.least_steps": "regime.min_steps",
    "probe.least_steps": "probe.min_steps",
    "optim.clip": "optim.grad_clip_norm",
    "optim.trust": "optim.trust_coefficient",
    "optim.start_factor": "optim.warmup_start_factor",
    "optim.end_factor": "optim.min_lr_factor",
    "downstream.least_score": "downstream.score_threshold",
    "pretext.temperature.learned.least": "pretext.temperature.learned.min",
    "pretext.temperature.learned.most": "pretext.temperature.learned.max",
    "pretext.temperature.cosine.high": "pretext.temperature.cosine.max",
    "pretext.keep": "pretext.memory_momentum",
    "pretext.keep_end": "pretext.memory_momentum_end",
    "domain.keep_end": "domain.memory_momentum_end",
    "domain.control": "domain.negative_control",
    "what": "metrics",
    "few_shot.decay": "few_shot.weight_decay",
    "probe.rates": "probe.lrs",
    "claimed": "reported_regime",
    "compared": "comparison",
    "controls": "negative_controls",
}
# What other programs call a thing, and how it is written here: the first line whose key the stage has.
_FOREIGN = {
    "batch batch_size batchsize bs": ("batch_size={}", "regime.batch_size={}"),
    "micro_batch_size accumulate_grad_batches grad_accum gradient_accumulation_steps": ("micro_batch_size={}",),
    "learning_rate base_lr": ("optim.lr={}", "regime.optim.lr={}"),
    "wd": ("optim.weight_decay={}", "regime.optim.weight_decay={}"),
    "epochs num_epochs n_epochs max_epochs": ("epochs={}", "regime.length={} epochs"),
    "steps num_steps n_steps max_steps iterations max_iter": ("steps={}", "regime.length={} steps"),
    "warmup_epochs": ("optim.warmup={} epochs", "regime.optim.warmup={} epochs"),
    "warmup_steps": ("optim.warmup={} steps", "regime.optim.warmup={} steps"),
    "tau": ("pretext.temperature.value={}",),
    "workers num_workers n_workers": ("num_workers={}",),
    "arch architecture model network net": ("backbone.name={}",),
    "pretrained": ("backbone.weights={}",),
    "checkpoint ckpt checkpoint_path ckpt_path": ("encoder={}", "backbone.weights={}"),
    "data_dir data_path data_root root dataset_path train_dir input path": ("data.path={}",),
    "output_dir out out_dir save_dir log_dir run_dir": ("output={}",),
    "image_size img_size input_size crop_size resolution": ("size={}", "transform.size={}"),
    "size": ("transform.size={}",),
    "method task loss": ("pretext={}", "downstream={}"),
    "optimizer": ("optim={}", "regime.optim.name={}"),
    "augmentation augmentations transform transforms": ("transform={}",),
    "logger wandb": ("tracking={}",),
    "labels_per_class shots n_labels": ("labels.per_class={}",),
    "random_seed": ("seed={}",),
    "eval_every": ("evaluate_every={}",),
    "log_interval": ("log_every={}",),
    "resume_from": ("output={}",),
    "freeze frozen linear_probe": ("regime=frozen",),
}
_PRECISION = ("precision", "amp", "fp16", "bf16", "mixed_precision", "dtype", "half")
_FP16 = ("fp16", "16", "float16", "half")
_PROCESSES = [
    "gpus",
    "num_gpus",
    "n_gpus",
    "ngpus",
    "devices",
    "num_processes",
    "nproc",
    "nproc_per_node",
    "world_size",
]
_DEVICE = ("device", "gpu", "cuda", "accelerator", *_PROCESSES)


def renamed(key: str, value: str, roots: Container[str] | None = None) -> str | None:
    """The sentence about a key that has a new name; None for any other key.

    Args:
        key: as typed.
        value: as typed; ``…`` if there is none.
        roots: the first parts of the verb's keys: a new name that it lacks is no answer. None takes any.
    """
    moved = _moved(key)
    if moved is None or (roots is not None and moved.partition("=")[0].partition(".")[0] not in roots):
        return None
    new, equals, example = moved.partition("=")
    line = f"{new}={example if equals else value}"
    return f"`{key}` is now `{new}`: type `{line if value == '…' else shlex.quote(line)}`."


def _moved(key: str) -> str | None:
    parts = key.split(".")
    spans = ((start, end) for start in range(len(parts)) for end in range(len(parts), start, -1))
    for start, end in spans:
        new = RENAMED_KEYS.get(".".join(parts[start:end]))
        if new is not None and (start == 0 or end - start > 1):  # a name of one part is that of a verb's own key
            moved = ".".join([*parts[:start], new, *parts[end:]])
            return _moved(moved) or moved
    return None


def flat(key: str) -> str:
    """A key as one word, as other programs write it: ``data.path`` is ``data_path``."""
    return key.replace(".", "_").replace("-", "_").lower()


def foreign(word: str) -> Iterator[str]:
    """The lines that a word of other programs may mean, ``{}`` in place of the value."""
    for words, lines in _FOREIGN.items():
        if word in words.split():
            yield from lines


def of_accelerate(stage: str, key: str, value: str) -> str | None:
    """The answer to a word for devices, processes or precision, which Accelerate sets; None for other words."""
    word, verb = flat(key), f"ssl-pipeline {stage.replace('_', ' ', 1)} …"
    launched = stage in ("pretrain", "finetune")
    if word in _PRECISION:
        half = value.lower() in _FP16 or word in ("fp16", "half")
        form = "fp16" if half else "bf16"
        launch = f"accelerate launch --mixed_precision {form} -m ssl_pipeline.{stage} …"
        return (
            f"Precision is Accelerate's: write `{launch if launched else f'ACCELERATE_MIXED_PRECISION={form} {verb}'}`."
        )
    if word in _PROCESSES and launched:
        count = value if value.isdecimal() else str(value.count(",") + 1) if "," in value else "2"
        launch = f"accelerate launch --multi_gpu --num_processes {count} -m ssl_pipeline.{stage} …"
        return f"Processes are Accelerate's, one for each GPU: write `{launch}`."
    if word not in _DEVICE:
        return None
    if value == "cpu":
        return f"A GPU is used where there is one. For the CPU write `ACCELERATE_USE_CPU=1 {verb}`."
    number = value.rpartition(":")[2]
    number = number if number.replace(",", "").isdecimal() else "0"
    return f"A GPU is used where there is one. To choose it, write `CUDA_VISIBLE_DEVICES={number} {verb}`."
