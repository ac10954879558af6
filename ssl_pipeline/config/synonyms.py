"""Keys by other names: those that they had here before, and those of other programs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

# Keys and groups that were renamed: an old name is refused, with the new one in the message. An entry also holds for the keys
# below it (`unlabelled.weight`), and entries may follow one another. A new name that takes other values has one: `key=value`.
RENAMED_KEYS: dict[str, str] = {
    "data.licence": "data.license",
    "unlabelled": "unlabeled",
}

# What other programs call a thing, and how it is written here: the first line whose key the stage has.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "batch_size batchsize bs": ("batch.size={}", "regime.batch={}"),
    "micro_batch_size accumulate_grad_batches grad_accum gradient_accumulation_steps": ("batch.micro={}",),
    "learning_rate base_lr": ("optim.lr={}", "regime.optim.lr={}"),
    "wd": ("optim.weight_decay={}", "regime.optim.weight_decay={}"),
    "epochs num_epochs n_epochs max_epochs": ("epochs={}", "regime.length={} epochs"),
    "steps num_steps n_steps max_steps iterations max_iter": ("steps={}", "regime.length={} steps"),
    "warmup_epochs": ("optim.warmup={} epochs", "regime.optim.warmup={} epochs"),
    "warmup_steps": ("optim.warmup={} steps", "regime.optim.warmup={} steps"),
    "tau": ("pretext.temperature.value={}",),
    "num_workers n_workers": ("workers={}",),
    "arch architecture model network net": ("backbone.name={}",),
    "pretrained": ("backbone.weights={}",),
    "checkpoint ckpt checkpoint_path ckpt_path": ("encoder={}", "backbone.weights={}"),
    "data_dir data_path data_root root dataset_path train_dir input path": ("data.path={}",),
    "output_dir out out_dir save_dir log_dir run_dir": ("output={}",),
    "image_size img_size input_size crop_size resolution": ("size={}", "views.size={}"),
    "size": ("views.size={}",),
    "method task loss": ("pretext={}", "downstream={}"),
    "optimizer": ("optim={}", "regime.optim.name={}"),
    "augmentation augmentations transform transforms": ("views={}",),
    "logger wandb": ("tracking={}",),
    "labels_per_class shots n_labels": ("labels.per_class={}",),
    "random_seed": ("seed={}",),
    "save_every": ("checkpoint_every={}",),
    "eval_every": ("evaluate_every={}",),
    "log_interval": ("log_every={}",),
    "resume_from": ("output={}",),
    "freeze frozen linear_probe": ("regime=frozen",),
}
_PRECISION = ("precision", "amp", "fp16", "bf16", "mixed_precision", "dtype", "half")
_PROCESSES = (
    "gpus",
    "num_gpus",
    "n_gpus",
    "ngpus",
    "devices",
    "num_processes",
    "nproc",
    "nproc_per_node",
    "world_size",
)


def flat(key: str) -> str:
    """A key as one word, as other programs write it: ``batch.size`` is ``batch_size``."""
    return key.replace(".", "_").replace("-", "_").lower()


def renamed(key: str, value: str) -> str | None:
    """The sentence about a key that has a new name; None for any other key."""
    moved = _moved(key)
    if moved is None:
        return None
    new, equals, example = moved.partition("=")
    line = f"{new}={example if equals else value}"
    return f"`{key}` is now `{new}`: type `{line if value == '…' else shlex.quote(line)}`."


def _moved(key: str) -> str | None:
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        new = RENAMED_KEYS.get(".".join(parts[:length]))
        if new is not None:
            moved = ".".join([new, *parts[length:]])
            return _moved(moved) or moved
    return None


def synonyms(word: str) -> Iterator[str]:
    """Lines that a word of other programs may mean, ``{}`` for the value; none for a word that no program is known for."""
    for called, lines in _SYNONYMS.items():
        if word in called.split():
            yield from lines


def of_launcher(stage: str, key: str, value: str) -> str | None:
    """What Accelerate is asked for: devices, processes and precision; None for other words.

    Args:
        stage: the name of its YAML.
        key: as it was typed.
        value: as it was typed.
    """
    word, verb = flat(key), stage.replace("_", " ", 1)
    launch = f"accelerate launch {{}} -m ssl_pipeline.{stage} …" if stage in ("pretrain", "finetune") else None
    if word in _PRECISION:
        form = {"fp16": "fp16", "16": "fp16", "float16": "fp16", "half": "fp16"}.get(
            value.lower(), "fp16" if word in ("fp16", "half") else "bf16"
        )
        line = (
            launch.format(f"--mixed_precision {form}")
            if launch
            else f"ACCELERATE_MIXED_PRECISION={form} ssl-pipeline {verb} …"
        )
        return f"Precision is Accelerate's: write `{line}`."
    if word in _PROCESSES and launch:
        count = value if value.isdecimal() else str(value.count(",") + 1) if "," in value else "2"
        return f"Processes are Accelerate's, one for each GPU: write `{launch.format(f'--multi_gpu --num_processes {count}')}`."
    if word in ("device", "gpu", "cuda", "accelerator", *_PROCESSES):
        if value == "cpu":
            return f"A GPU is taken where there is one. For the CPU write `ACCELERATE_USE_CPU=1 ssl-pipeline {verb} …`."
        number = value.rpartition(":")[2]
        number = number if number.replace(",", "").isdecimal() else "0"
        return f"A GPU is taken where there is one. To say which, write `CUDA_VISIBLE_DEVICES={number} ssl-pipeline {verb} …`."
    return None
