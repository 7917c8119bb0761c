"""`python -m models.training --data DIR --run-dir DIR`: train teacher and network, or go on with an interrupted run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.training.config import PretrainedTeacherConfig, RunConfig, StudentConfig, TeacherConfig
from models.training.data import Split, join, load, read_photos, read_unlabelled, to_tensor, write_held_out
from models.training.learners import StudentLearner, TeacherLearner
from models.training.loop import CHECKPOINT, Learner, accuracy_per_exit, fit
from models.training.teacher import PretrainedTeacher, start_stem
from models.training.views import StoredViews, store_views
from models.training.whitening import whiten
from models.vit_state import num_heads_of
from models.weights import WeightsError, load_state_dict, sha256_of
from models.zoo import ZOO, ZooEntry

HELD_OUT = "held_out.zip"
VIEWS, UNLABELLED_VIEWS = "views", "unlabelled"
WHITENING_IMAGES = 4000
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Write `teacher/`, `network/` and `held_out.zip`, and print the test accuracy of each exit."""
    arguments = _arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    entry = ZOO[arguments.model]
    data, held_out, test = load(arguments.data, entry.labels)
    if arguments.photos is not None:
        classes = json.loads(arguments.photo_classes.read_text())
        photos = read_photos(arguments.photos, entry.labels, classes, entry.config.image_size)
        data = join(data, photos)
        print(f"{len(photos.labels)} further photographs")
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    write_held_out(arguments.data / "train.zip", arguments.run_dir / HELD_OUT)

    teacher, taught_by = _taught(arguments, entry, data, held_out)
    if teacher is not None:
        print(f"teacher, test top-1: {100 * accuracy_per_exit(teacher, test, bf16=StudentConfig().bf16)[0]:.2f} %")

    student_config = replace(
        StudentConfig(),
        model=arguments.model,
        epochs=arguments.epochs,
        first_stage_epochs=arguments.first_stage_epochs,
        learning_rate=arguments.learning_rate,
        augment=StudentConfig().augment.rarer(arguments.augmentation),
        stem_from="" if arguments.stem_from is None else sha256_of(arguments.stem_from),
        distillation=arguments.distillation,
        stored_views=arguments.stored_views,
        unlabelled_per_batch=arguments.unlabelled_per_batch if arguments.unlabelled is not None else 0,
        seed=arguments.seed,
        taught_by=taught_by,
        started_from="" if arguments.start_from is None else sha256_of(arguments.start_from),
    )
    stored = None
    if teacher is not None and student_config.stored_views:
        stored = _stored(arguments, student_config, entry, data, teacher)
    student = StudentLearner(student_config, entry, teacher)
    if arguments.start_from is not None:
        student.start_from(arguments.start_from)
    if student_config.first_stage_epochs:
        first_config = replace(student_config, epochs=student_config.first_stage_epochs)
        first = StudentLearner(first_config, entry, teacher, num_stages=1)
        if arguments.stem_from is None:
            start_white(first, data)
        else:
            start_stem(first.model, arguments.stem_from)
        fit(first, first_config, data, held_out, arguments.run_dir / "first_stage", "first stage", stored)
        student.start_from(arguments.run_dir / "first_stage" / CHECKPOINT)
    fit(student, student_config, data, held_out, arguments.run_dir / "network", arguments.model, stored)
    accuracies = accuracy_per_exit(student, test, bf16=False)
    print("test top-1 by exit: " + ", ".join(f"{100 * accuracy:.2f} %" for accuracy in accuracies))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    student_config = StudentConfig()
    parser = argparse.ArgumentParser(prog="python -m models.training", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and test.zip, <class>/<n>.jpg inside")
    parser.add_argument("--run-dir", type=Path, required=True, help="where checkpoints, logs and curves go; outside git")
    parser.add_argument("--photos", type=Path, help="zip of <folder>/<file>: further photographs to train on")
    parser.add_argument("--photo-classes", type=Path, default=IMAGENET_CLASSES, help="JSON {folder: class}; default: ImageNet")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument("--model", choices=sorted(ZOO), default=student_config.model)
    parser.add_argument("--epochs", type=int, default=student_config.epochs, help=f"default {student_config.epochs}")
    parser.add_argument(
        "--first-stage-epochs",
        type=int,
        default=student_config.first_stage_epochs,
        help=f"of the first stage alone, before; default {student_config.first_stage_epochs}",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        help="another run's network/checkpoint.pt, instead of a first stage: learn on, by another teacher",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=student_config.learning_rate,
        help=f"the highest, of the network; default {student_config.learning_rate}; less is wise with --start-from",
    )
    parser.add_argument(
        "--teacher-epochs",
        type=int,
        help=f"of a teacher, before; default {TeacherConfig().epochs}, {PretrainedTeacherConfig().epochs} of one with weights; "
        "0: the last exit teaches the others",
    )
    parser.add_argument(
        "--teacher-weights",
        type=Path,
        help="a Vision Transformer under timm's names, fitted to the classes and learned from instead of a convolutional one",
    )
    parser.add_argument("--teacher-config", type=Path, help="its config.json, as timm writes it: mean, std, heads")
    parser.add_argument(
        "--augmentation",
        type=float,
        default=1.0,
        help="of the network's images, how many times as many are changed as by default; 0.3 suits a last, short run",
    )
    parser.add_argument(
        "--stem-from",
        type=Path,
        help="the convolutional teacher's checkpoint.pt of another run: the stem starts from its groups",
    )
    parser.add_argument(
        "--distillation",
        type=float,
        default=student_config.distillation,
        help=f"share of the teacher in the loss, where it is right; default {student_config.distillation}",
    )
    parser.add_argument(
        "--stored-views",
        type=int,
        default=student_config.stored_views,
        help="draw so many views of each image before the training and ask the teacher then; 0: new ones in every step",
    )
    parser.add_argument(
        "--unlabelled",
        type=Path,
        help="with --stored-views, zip of <folder>/<file>: photographs of anything, to learn the teacher's answers of; folders "
        "that are mapped to a class are passed over",
    )
    parser.add_argument(
        "--unlabelled-per-batch", type=int, default=48, help="how many of them beside each batch's images; default 48"
    )
    parser.add_argument("--seed", type=int, default=student_config.seed)
    arguments = parser.parse_args(argv)
    if (arguments.teacher_weights is None) != (arguments.teacher_config is None):
        parser.error("--teacher-weights and --teacher-config, timm's config.json, go together")
    if arguments.teacher_epochs == 0 and arguments.teacher_weights is not None:
        parser.error("--teacher-epochs 0 leaves no teacher, and --teacher-weights names one")
    if arguments.stored_views < 0:
        parser.error("--stored-views is a number of views, or 0")
    if arguments.stored_views and arguments.teacher_epochs == 0:
        parser.error("--stored-views keeps a teacher's answers, and --teacher-epochs 0 leaves no teacher")
    if arguments.unlabelled is not None and not (arguments.stored_views and arguments.unlabelled_per_batch > 0):
        parser.error("--unlabelled goes with --stored-views, and --unlabelled-per-batch is at least 1")
    if not 0 <= arguments.distillation <= 1:
        parser.error("--distillation is a share between 0 and 1")
    if not 0 <= arguments.augmentation <= 1:
        parser.error("--augmentation is a factor between 0 and 1")
    if arguments.stem_from is not None:
        if not arguments.stem_from.is_file():
            parser.error(f"--stem-from: there is no {arguments.stem_from}")
        if arguments.start_from is not None or not arguments.first_stage_epochs:
            parser.error("--stem-from starts the first stage: not with --start-from, nor with --first-stage-epochs 0")
    if arguments.start_from is not None:
        if not arguments.start_from.is_file():
            parser.error(f"--start-from: there is no {arguments.start_from}")
        arguments.first_stage_epochs = 0
    return arguments


def _taught(arguments: argparse.Namespace, entry: ZooEntry, data: Split, held_out: Split) -> tuple[TeacherLearner | None, str]:
    """The teacher, trained to its end, and what it is; None where none is wanted."""
    if arguments.teacher_epochs == 0:
        return None, "its own last exit"
    config: RunConfig
    if arguments.teacher_weights is None:
        config = replace(TeacherConfig(), epochs=arguments.teacher_epochs or TeacherConfig().epochs, seed=arguments.seed)
        teacher, taught_by = TeacherLearner(config, entry), StudentConfig().taught_by
        start_white(teacher, data)
    else:
        state = load_state_dict(arguments.teacher_weights)
        config = pretrained_config(arguments, state)
        ours = (entry.preprocess.mean, entry.preprocess.std)
        teacher = TeacherLearner(config, entry, PretrainedTeacher(state, len(entry.labels), config, ours))
        taught_by = f"a Vision Transformer, {config.weights_sha256[:16]}"
    fit(teacher, config, data, held_out, arguments.run_dir / "teacher", "teacher")
    teacher.load(arguments.run_dir / "teacher" / CHECKPOINT)
    return teacher, taught_by


def _stored(
    arguments: argparse.Namespace, config: StudentConfig, entry: ZooEntry, data: Split, teacher: TeacherLearner
) -> StoredViews:
    """Views of the training images, and one of each further photograph."""
    views = store_views(data.images, teacher, config, arguments.run_dir / VIEWS, stored_views=config.stored_views)
    if arguments.unlabelled is None:
        return StoredViews(views)
    classes = json.loads(arguments.photo_classes.read_text())
    images = read_unlabelled(arguments.unlabelled, classes, entry.config.image_size)
    print(f"{len(images)} photographs without a label")
    further = store_views(images, teacher, config, arguments.run_dir / UNLABELLED_VIEWS, stored_views=1)
    return StoredViews(views, further, config.unlabelled_per_batch)


def pretrained_config(arguments: argparse.Namespace, state: dict[str, Tensor]) -> PretrainedTeacherConfig:
    """Of a timm checkpoint and the configuration beside it.

    Raises:
        WeightsError: nobody says how many heads it has.
    """
    told = json.loads(arguments.teacher_config.read_text())
    num_heads = told.get("model_args", {}).get("num_heads") or num_heads_of(state)
    if num_heads is None:
        raise WeightsError(f"say num_heads in model_args of {arguments.teacher_config.name}: its width does not tell it")
    return PretrainedTeacherConfig(
        epochs=arguments.teacher_epochs or PretrainedTeacherConfig().epochs,
        seed=arguments.seed,
        weights_sha256=sha256_of(arguments.teacher_weights),
        num_heads=num_heads,
        mean=tuple(told["pretrained_cfg"]["mean"]),
        std=tuple(told["pretrained_cfg"]["std"]),
    )


def start_white(learner: Learner, data: Split) -> None:
    """Whiten the first convolution on some of the images, where there is one; a checkpoint takes precedence later."""
    for module in learner.model.modules():
        if isinstance(module, nn.Conv2d):
            if module.kernel_size == (3, 3):
                whiten(module, to_tensor(data.images[:WHITENING_IMAGES], learner.mean, learner.std))
            return


if __name__ == "__main__":
    main()
