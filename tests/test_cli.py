"""LightningCLI builds and trains a DGLModule from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_dgl import DGLModule, DGLStrategy, LinearHead
from tests.runs import loader, small_cnn


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()

    def test_dataloader(self) -> Any:
        return loader()


class SmallNetwork(torch.nn.Sequential):
    def __init__(self, num_classes: int = 4) -> None:
        super().__init__(*small_cnn(num_classes))


CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": "dgl",
        "max_epochs": 1,
        "limit_train_batches": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "model": {
        "network": {"class_path": "tests.test_cli.SmallNetwork", "init_args": {"num_classes": 4}},
        "num_blocks": 3,
        "example_input": [2, 3, 8, 8],
        "head": "linear",
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.03, "momentum": 0.9}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
    },
}


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    """CONFIG with some entries of its sections replaced; None removes an entry."""
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in CONFIG.items()}
    for name, entries in sections.items():
        config[name].update(entries)
        config[name] = {key: value for key, value in config[name].items() if value is not None}
    return config


def run_cli(tmp_path: Path, config: dict[str, Any], *args: str, run: bool = True) -> LightningCLI:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    own = [f"--config={path}", f"--trainer.default_root_dir={tmp_path}", *args]
    return LightningCLI(DGLModule, Data, args=["fit", *own] if run else own, run=run, save_config_callback=None)


def test_fit_from_yaml(tmp_path: Path) -> None:
    cli = run_cli(tmp_path, CONFIG)
    assert cli.trainer.global_step == 2
    assert isinstance(cli.trainer.strategy, DGLStrategy)
    assert isinstance(cli.model, DGLModule)
    assert len(cli.model.blocks) == 3
    assert all(isinstance(head, LinearHead) for head in cli.model.heads)
    for optimizer in cli.model.optimizers().optimizers:  # type: ignore[union-attr]
        assert type(optimizer) is torch.optim.SGD
        assert optimizer.param_groups[0]["momentum"] == 0.9
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.015)
    assert "val/acc" in cli.trainer.callback_metrics


def test_command_line_overrides_yaml(tmp_path: Path) -> None:
    cli = run_cli(tmp_path, CONFIG, "--model.head=cnn", "--model.optimizer.init_args.lr=0.5", "--model.num_blocks=2")
    assert [type(head).__name__ for head in cli.model.heads] == ["CNNHead"]
    assert [o.param_groups[0]["lr"] for o in cli.model.optimizers().optimizers] == [0.25, 0.25]  # type: ignore[union-attr]


def test_strategy_by_class_path(tmp_path: Path) -> None:
    strategy = {"class_path": "lightning_dgl.DGLStrategy", "init_args": {"schedule": "sync"}}
    cli = run_cli(tmp_path, changed(trainer={"strategy": strategy}))
    assert isinstance(cli.trainer.strategy, DGLStrategy)
    assert cli.trainer.global_step == 2


def test_schedule_by_class_path(tmp_path: Path) -> None:
    schedule = {"class_path": "lightning_dgl.Synchronous"}
    strategy = {"class_path": "lightning_dgl.DGLStrategy", "init_args": {"schedule": schedule}}
    cli = run_cli(tmp_path, changed(trainer={"strategy": strategy}))
    assert cli.trainer.global_step == 2


def test_defaults_and_split_at(tmp_path: Path) -> None:
    model = {"num_blocks": None, "split_at": ["6"], "head": None, "optimizer": None, "lr_scheduler": None}
    cli = run_cli(tmp_path, changed(model=model))
    assert [type(head).__name__ for head in cli.model.heads] == ["AugmentedHead"]
    assert cli.trainer.global_step == 2


def test_lists_with_one_entry_for_each_block(tmp_path: Path) -> None:
    rates = [0.1, 0.2, 0.3]
    optimizers = [{"class_path": "torch.optim.SGD", "init_args": {"lr": rate}} for rate in rates]
    model = {"optimizer": optimizers, "head": ["linear", "mlp"], "lr_scheduler": None}
    cli = run_cli(tmp_path, changed(model=model))
    assert [type(head).__name__ for head in cli.model.heads] == ["LinearHead", "MLPHead"]
    assert [o.param_groups[0]["lr"] for o in cli.model.optimizers().optimizers] == rates  # type: ignore[union-attr]


def test_head_and_metrics_by_class_path(tmp_path: Path) -> None:
    metrics = {"class_path": "torchmetrics.classification.MulticlassF1Score", "init_args": {"num_classes": 4}}
    cli = run_cli(tmp_path, changed(model={"head": {"class_path": "lightning_dgl.CNNHead"}, "metrics": metrics}))
    assert [type(head).__name__ for head in cli.model.heads] == ["CNNHead", "CNNHead"]
    assert "val/MulticlassF1Score" in cli.trainer.callback_metrics


def test_plateau_by_class_path(tmp_path: Path) -> None:
    scheduler = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau", "init_args": {"patience": 0}}
    assert run_cli(tmp_path, changed(model={"lr_scheduler": scheduler})).trainer.global_step == 2


def test_loss_by_class_path(tmp_path: Path) -> None:
    loss = {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}}
    cli = run_cli(tmp_path, changed(model={"loss": loss}))
    assert cli.model.loss.label_smoothing == 0.1
    assert cli.trainer.global_step == 2


def test_loss_by_function_name(tmp_path: Path) -> None:
    cli = run_cli(tmp_path, changed(model={"loss": "torch.nn.functional.cross_entropy"}))
    assert cli.trainer.global_step == 2


def test_torchvision_model_by_class_path(tmp_path: Path) -> None:
    network = {"class_path": "torchvision.models.squeezenet1_1", "init_args": {"num_classes": 4}}
    model = {"network": network, "example_input": [2, 3, 32, 32]}
    cli = run_cli(tmp_path, changed(model=model), run=False)
    assert len(cli.model.blocks) == 3


def test_printed_config_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(tmp_path, CONFIG, "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["example_input"] == [2, 3, 8, 8]
    first, second = run_cli(tmp_path, CONFIG), run_cli(tmp_path, printed)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    with pytest.raises(SystemExit):
        run_cli(tmp_path, printed, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out) == printed


def test_printed_defaults_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(tmp_path, changed(model={"head": None, "optimizer": None, "lr_scheduler": None}), "--print_config")
    assert run_cli(tmp_path, yaml.safe_load(capsys.readouterr().out)).trainer.global_step == 2


def test_config_is_saved_and_read_again(tmp_path: Path) -> None:
    config = changed(
        trainer={
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    cli = LightningCLI(DGLModule, Data, args=["fit", f"--config={path}"])
    (saved,) = Path(cli.trainer.log_dir).glob("config.yaml")
    again = LightningCLI(DGLModule, Data, args=["fit", f"--config={saved}"], save_config_callback=None)
    assert again.trainer.global_step == 2


def test_checkpoint_of_a_cli_run_is_plain_data(tmp_path: Path) -> None:
    cli = run_cli(tmp_path, CONFIG)
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    network = SmallNetwork()
    loaded = DGLModule.load_from_checkpoint(
        tmp_path / "a.ckpt", network=network, example_input=(2, 3, 8, 8), weights_only=True
    )
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), cli.model.parameters(), strict=True))
    test = LightningCLI(
        DGLModule,
        Data,
        args=["test", f"--config={tmp_path / 'config.yaml'}", f"--ckpt_path={tmp_path / 'a.ckpt'}"],
        save_config_callback=None,
    )
    assert "test/acc" in test.trainer.callback_metrics


def test_the_cli_s_own_optimizer_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"--model\.optimizer, not --optimizer"):
        run_cli(tmp_path, CONFIG, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1")


def test_an_error_in_the_config_names_the_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError), match=r"2|head must be") as caught:
        run_cli(tmp_path, CONFIG, "--model.head=conv")
    assert "head" in str(caught.value) + capsys.readouterr().err
