"""timm's and torchvision's input pipelines, in one worker process."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator

import torch

from scripts.bench import torch_step


def batches(
  root: pathlib.Path,
  library: str,
  policy: str,
  size_px: int,
  batch_size: int,
  num_images: int,
) -> Iterator:
  """Batches of clean images, and of augmented ones too if there is a policy.

  Args:
    root: holds train/, with a folder for each class.
    library: 'timm' or 'torchvision', whose crop and flip are taken.
    policy: AutoAugment's, as the library names it; '' is none.
    size_px: of the images.
    batch_size: images of a batch.
    num_images: of all batches, drawn with replacement.
  """
  torch_step.import_timm()  # also beside a torch of another build
  from torchvision import datasets

  torch.set_num_threads(1)
  clean = _transform(library, '', size_px)
  augmented = _transform(library, policy, size_px)

  def views(image):
    return (clean(image), augmented(image)) if policy else clean(image)

  folder = datasets.ImageFolder(str(root / 'train'), transform=views)
  order = torch.randint(
    len(folder), (num_images,), generator=torch.Generator().manual_seed(0)
  )
  return iter(
    torch.utils.data.DataLoader(
      folder, batch_size, sampler=order.tolist(), num_workers=1, drop_last=True
    )
  )


def _transform(library: str, policy: str, size_px: int) -> Callable:
  """Crop, flip, AutoAugment if there is a policy, and uint8 tensor."""
  if library == 'timm':
    from timm import data

    return data.create_transform(
      size_px,
      is_training=True,
      scale=(0.08, 1.0),
      ratio=(3 / 4, 4 / 3),
      interpolation='bicubic',
      color_jitter=None,
      auto_augment=policy or None,
      use_prefetcher=True,  # uint8; normalised on the device, as ours
    )
  from torchvision import transforms

  bicubic = transforms.InterpolationMode.BICUBIC
  steps = [
    transforms.RandomResizedCrop(size_px, interpolation=bicubic),
    transforms.RandomHorizontalFlip(),
  ]
  if policy:
    steps.append(transforms.AutoAugment(transforms.AutoAugmentPolicy(policy)))
  return transforms.Compose([*steps, transforms.PILToTensor()])
