"""Share what the training scripts need: arguments, codecs, loggers, plots and checkpoints."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lightning_dgl import BlockMonitor, DGLModule, VectorQuantizer, plot_blocks


def be_quiet() -> None:
    """Silence Lightning's hints that nobody needs here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    expected = ("does not have many workers", "GPU available but not used", "LeafSpec", "have no `val_dataloader`")
    warnings.filterwarnings("ignore", f".*({'|'.join(expected)}).*")


def add_codec(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`make_codec` reads."""
    parser.add_argument(
        "--codec", type=_codec, help="between blocks: raw, half, or 256x8: codes x dimension (x codebooks)"
    )
    parser.add_argument("--compile-codec", action="store_true", help="the search for codes; needs a C++ compiler")


def _codec(text: str) -> str | list[int] | None:
    """Parse ``--codec``: raw (None), "half", or the number of codes, their dimension, and the number of codebooks."""
    if text in ("raw", "half"):
        return None if text == "raw" else "half"
    numbers = text.split("x")
    if len(numbers) not in (2, 3) or not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"must be raw, half, or codes x dimension such as 256x8, got {text!r}")
    return [int(number) for number in numbers]


def make_codec(args: argparse.Namespace) -> str | VectorQuantizer | None:
    if not isinstance(args.codec, list):
        return args.codec
    num_codes, code_dim, num_codebooks = [*args.codec, 1][:3]
    # The trainings here are shorter than those that the default decay of 0.99 is for.
    return VectorQuantizer(num_codes, code_dim, 0.9, num_codebooks=num_codebooks, compile=args.compile_codec)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every run: how it computes, and where its outcome goes."""
    parser.add_argument("--compile", action="store_true", help="blocks and heads; needs a C++ compiler")
    parser.add_argument(
        "--channels-last", action="store_true", help="memory format that many convolutions are faster in"
    )
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for logs, plots and checkpoints")
    parser.add_argument(
        "--wandb", default="disabled", choices=("online", "offline", "disabled"), help="log to Weights & Biases, too"
    )


def make_loggers(args: argparse.Namespace, name: str, tags: list[str]) -> list[Logger]:
    """Return loggers to CSV below ``args.output`` and to Weights & Biases; both record the settings of the run."""
    loggers: list[Logger] = [CSVLogger(args.output, name=name)]
    if args.wandb == "disabled":
        print("Logged to CSV files only; --wandb online or offline logs to Weights & Biases, too.")
    else:
        try:
            # The run's own folder, whatever else was logged below args.output before.
            loggers.append(
                WandbLogger(
                    name=name,
                    project="lightning-dgl",
                    save_dir=loggers[0].log_dir,
                    offline=args.wandb == "offline",
                    tags=tags,
                )
            )
        except ModuleNotFoundError:
            sys.exit("--wandb needs the package wandb: pip install wandb, or leave it out")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    for logger in loggers:
        logger.log_hyperparams(settings)
    return loggers


def keep(checkpoint: Path) -> ModelCheckpoint:
    """Keep the state after each epoch in the file ``checkpoint``."""
    return ModelCheckpoint(checkpoint.parent, checkpoint.stem, enable_version_counter=False)


def make_callbacks(loggers: Sequence[Logger], module: L.LightningModule) -> list[L.Callback]:
    """Keep the last state, and watch learning rates and blocks."""
    return [
        keep(Path(str(loggers[0].log_dir)) / "checkpoints" / "last.ckpt"),
        LearningRateMonitor("epoch"),
        *([BlockMonitor()] if isinstance(module, DGLModule) else []),
    ]


def finish(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Plot what was logged, and give plot and checkpoint to Weights & Biases."""
    folder = Path(str(trainer.loggers[0].log_dir))
    plot: Path | None = None
    if isinstance(module, DGLModule):
        try:
            plot_blocks(folder).savefig(plot := folder / "blocks.png", dpi=150)
        except ImportError as error:
            print(f"No plots were drawn: {error}")
    print(f"Log{', plot' if plot else ''} and checkpoint: {folder}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            if plot is not None:
                logger.log_image("plots/blocks", [str(plot)])
            checkpoint = trainer.checkpoint_callback
            if isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
                logger.experiment.log_artifact(checkpoint.best_model_path, f"checkpoint-{logger.version}", type="model")
            logger.experiment.finish()
