"""Small images in memory: handwritten digits, CIFAR-10, or any folder of images, as batches ready to train on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import uuid4

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.functional import pil_to_tensor

Images = tuple[Tensor, Tensor]
"""Images (N, C, H, W), uint8, and their labels (N,), int64."""


def load(source: str, folder: Path) -> tuple[Images, Images]:
    """Return training and test images.

    Args:
        source: "digits" (they come with scikit-learn), "cifar10" (downloaded), or an image folder: ``train/<class>/*``
            and ``test/<class>/*``, images of one size.
        folder: where downloads go, and what was decoded of an image folder.

    Raises:
        FileNotFoundError: if there is no such image folder, or one of a class is empty.
        ValueError: if training and test images are not of the same classes, or an image is broken or of another size.
    """
    if source == "digits":
        return _digits()
    if source == "cifar10":
        train, test = (CIFAR10(folder, train=is_train, download=True) for is_train in (True, False))
        return tuple((torch.tensor(d.data).permute(0, 3, 1, 2), torch.tensor(d.targets)) for d in (train, test))  # type: ignore[return-value]
    missing = [part for part in ("train", "test") if not (Path(source) / part).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"There is no folder {Path(source) / missing[0]}. Data is 'digits', 'cifar10', or a folder with train/ and "
            "test/, which hold a folder of images for each class."
        )
    where = hashlib.sha256(str(Path(source).resolve()).encode()).hexdigest()[:8]
    decoded = folder / f"{Path(source).resolve().name}-{where}.pt"
    if not decoded.exists():
        train_files, test_files = (ImageFolder(str(Path(source) / part)) for part in ("train", "test"))
        if train_files.classes != test_files.classes:
            raise ValueError(
                f"{source}/train has classes {train_files.classes}, but test has {test_files.classes}. Unpack the data "
                "again, or give both the same folders."
            )
        folder.mkdir(parents=True, exist_ok=True)
        images = [_decode(train_files), _decode(test_files)]
        unfinished = decoded.with_suffix(f".{uuid4()}.part")  # other processes may decode them, too
        torch.save(images, unfinished)
        unfinished.rename(decoded)
    train, test = torch.load(decoded)
    return train, test


def _decode(files: ImageFolder) -> Images:
    images = []
    for path, _ in files.samples:
        try:
            images.append(pil_to_tensor(files.loader(path)))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}. Unpack the data again.") from error
        if images[-1].shape != images[0].shape:
            raise ValueError(f"{path} is of shape {tuple(images[-1].shape)}, others of {tuple(images[0].shape)}.")
    return torch.stack(images), torch.tensor(files.targets)


def _digits() -> tuple[Images, Images]:
    """1437 and 360 images of 16×16, in a split that is always the same."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) * (255 / 16)
    x = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False).round().byte()
    y = torch.tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return (x[train], y[train]), (x[test], y[test])


def batches(images: Images, batch_size: int, train: bool = False) -> DataLoader[Images]:
    """Return batches of uint8 images, each made in one piece; in training shuffled, without the incomplete last."""
    dataset = TensorDataset(*images)
    sampler = BatchSampler(RandomSampler(dataset) if train else SequentialSampler(dataset), batch_size, drop_last=train)
    # Evaluation draws its loader's seed from elsewhere, so that training goes on as it would without.
    generator = None if train else torch.Generator()
    return DataLoader(dataset, sampler=sampler, batch_size=None, generator=generator)  # type: ignore[arg-type]


class Preprocessing:
    """Turns uint8 images into float images: normalised with the training set's statistics, and augmented for training.

    Args:
        images: those of the training set (N, C, H, W).
        augment: whether to crop (with padding 4) and flip training images at random; not for digits.
    """

    def __init__(self, images: Tensor, augment: bool) -> None:
        sample = images[:10_000].float() / 255
        self.mean = sample.mean((0, 2, 3)).view(-1, 1, 1)
        self.std = sample.std((0, 2, 3)).view(-1, 1, 1)
        self.augment = augment

    def __call__(self, images: Tensor, train: bool) -> Tensor:
        """(N, C, H, W), uint8 -> float32."""
        x = (images.float() / 255 - self.mean.to(images.device)) / self.std.to(images.device)
        return _crop_and_flip(x) if train and self.augment else x


def _crop_and_flip(x: Tensor, padding: int = 4) -> Tensor:
    n, _, height, width = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=x.device)
    columns = torch.arange(width, device=x.device)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns, columns.flip(0)) + left
    rows = torch.arange(height, device=x.device) + top
    padded = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    crop = padded[torch.arange(n, device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crop.permute(0, 3, 1, 2).contiguous()
