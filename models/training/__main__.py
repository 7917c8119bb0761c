"""`python -m models.training --data DIR --run-dir DIR`: train, or go on with an interrupted run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from models.training.data import load, to_tensor, write_held_out
from models.training.train import TrainConfig, accuracy_per_exit, train
from models.zoo import ZOO


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write `held_out.zip`, and print the test accuracy of each exit."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(prog="python -m models.training", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.zip and test.zip, <class>/<n>.jpg inside")
    parser.add_argument("--run-dir", type=Path, required=True, help="where the checkpoint and the log go; outside git")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument("--model", choices=sorted(ZOO), default=defaults.model)
    for name in ("epochs", "batch_size", "learning_rate", "weight_decay", "seed"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    arguments = vars(parser.parse_args(argv))
    if arguments["threads"]:
        torch.set_num_threads(arguments["threads"])

    config = TrainConfig(**{f.name: arguments[f.name] for f in fields(TrainConfig) if f.name in arguments})
    entry = ZOO[config.model]
    data, held_out, test = load(arguments["data"], entry.labels)
    arguments["run_dir"].mkdir(parents=True, exist_ok=True)
    write_held_out(arguments["data"] / "train.zip", arguments["run_dir"] / "held_out.zip")
    model = train(config, data, held_out, arguments["run_dir"])
    accuracies = accuracy_per_exit(model, to_tensor(test.images, entry.preprocess.mean, entry.preprocess.std), test.labels)
    print("test top-1 by exit: " + ", ".join(f"{100 * accuracy:.2f} %" for accuracy in accuracies))


if __name__ == "__main__":
    main()
