"""PyTorch's training step, for `scripts/bench_step.py` to run beside ours.

The network is timm's where timm has it, else a small ResNet of the same sizes.
`plain` is a step on clean images. `advprop` is the sequential one of AdvProp
(arXiv:1911.09665): the gradient of the pixels through the auxiliary batch norms
(FGSM), then a clean and an adversarial pass, and one update. SGD with momentum;
channels_last; bfloat16 by autocast.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

SMALL = {'resnet8': 1, 'resnet20': 3}  # blocks per stage
WARM_UP_STEPS = 3
_kept: list[torch.library.Library] = []


class Task(NamedTuple):
  """What is trained, and how.

  Attributes:
    model: our name of the network.
    num_classes: of its logits.
    images: uint8 [N, H, W, C].
    labels: int [N].
    mean: per channel, in grey levels of 255.
    std: likewise.
    bfloat16: autocast to it.
    drop_rate: before the last layer.
    drop_path_rate: of stochastic depth.
    epsilon: of FGSM, in grey levels of 255.
    label_smoothing: of the loss that is trained on.
  """

  model: str
  num_classes: int
  images: Any
  labels: Any
  mean: tuple[float, ...]
  std: tuple[float, ...]
  bfloat16: bool
  drop_rate: float
  drop_path_rate: float
  epsilon: float
  label_smoothing: float


class Route:
  """Which batch norms are in use: 0 the main ones, 1 the auxiliary ones."""

  index = 0


class RoutedNorm(nn.Module):
  """A batch norm and its auxiliary copy."""

  def __init__(self, norm: nn.Module, route: Route):
    super().__init__()
    self.norms = nn.ModuleList([norm, copy.deepcopy(norm)])
    self.route = route

  def forward(self, x):
    return self.norms[self.route.index](x)


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut, as in `conadv_jax.models.resnet`."""

  def __init__(self, inputs: int, width: int, stride: int):
    super().__init__()
    self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)
    self.shortcut = nn.Identity()
    if stride > 1 or inputs != width:
      self.shortcut = nn.Sequential(
        nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
      )

  def forward(self, x):
    y = functional.relu(self.bn1(self.conv1(x)))
    return functional.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


class SmallResNet(nn.Module):
  """resnet8 and resnet20, which timm lacks."""

  def __init__(self, blocks: int, num_classes: int, channels: int):
    super().__init__()
    self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(16)
    layers, inputs = [], 16
    for stage in range(3):
      for i in range(blocks):
        width = 16 * 2**stage
        layers.append(Block(inputs, width, 2 if stage and not i else 1))
        inputs = width
    self.layers = nn.Sequential(*layers)
    self.fc = nn.Linear(inputs, num_classes)

  def forward(self, x):
    x = functional.relu(self.bn1(self.conv1(x)))
    return self.fc(self.layers(x).mean((2, 3)))


def import_timm():
  """timm, also where torchvision lacks its compiled operations."""
  try:
    import torchvision  # noqa: F401
  except RuntimeError:  # operator torchvision::nms does not exist
    for name in [m for m in sys.modules if m.split('.')[0] == 'torchvision']:
      del sys.modules[name]
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
      library.define(
        f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
      )
    _kept.append(library)  # its end would take the definitions back
  import timm

  return timm


def network(task: Task) -> nn.Module:
  """timm's network of our name, or the small one."""
  channels = task.images.shape[-1]
  if task.model in SMALL:
    return SmallResNet(SMALL[task.model], task.num_classes, channels)
  is_efficientnet = task.model.startswith('efficientnet')
  return import_timm().create_model(
    f'tf_{task.model}' if is_efficientnet else task.model,
    num_classes=task.num_classes,
    in_chans=channels,
    drop_rate=task.drop_rate,
    drop_path_rate=task.drop_path_rate,
  )


def add_auxiliary_norms(module: nn.Module, route: Route) -> None:
  """Replaces each batch norm in `module` by a `RoutedNorm`."""
  for name, child in module.named_children():
    if isinstance(child, nn.BatchNorm2d):
      setattr(module, name, RoutedNorm(child, route))
    else:
      add_auxiliary_norms(child, route)


def make_step(
  kind: str, task: Task, device: str, compiles: bool = False
) -> tuple[nn.Module, Callable[[], None]]:
  """Returns the network and a call that takes one step with it.

  Args:
    kind: 'plain' or 'advprop'.
    task: what is trained.
    device: 'cpu' or 'cuda'.
    compiles: the network goes through torch.compile.
  """
  like, route = {'memory_format': torch.channels_last}, Route()
  net = network(task).train()
  if kind == 'advprop':
    add_auxiliary_norms(net, route)
  net = net.to(device, **like)
  parameters = list(net.parameters())
  images = torch.from_numpy(task.images).permute(0, 3, 1, 2).to(device, **like)
  labels = torch.from_numpy(task.labels).long().to(device)
  mean, std = (
    torch.tensor(x, device=device).view(1, -1, 1, 1)
    for x in (task.mean, task.std)
  )
  optimizer = torch.optim.SGD(
    parameters, 1e-3, momentum=0.9, weight_decay=1e-4, fused=device == 'cuda'
  )
  autocast = torch.autocast(device, torch.bfloat16, enabled=task.bfloat16)
  if compiles:
    net.compile(dynamic=False)

  def loss(index, pixels, smoothing):
    route.index = index
    logits = net((pixels - mean) / std).float()
    return functional.cross_entropy(logits, labels, label_smoothing=smoothing)

  def attacked(pixels):
    for parameter in parameters:  # no gradient of a weight is to be computed
      parameter.requires_grad_(False)
    with autocast:
      value = loss(1, pixels.requires_grad_(), 0.0)
    (gradient,) = torch.autograd.grad(value, pixels)
    for parameter in parameters:
      parameter.requires_grad_(True)
    pixels = pixels.detach()
    return (pixels + task.epsilon * gradient.sign()).clamp(0, 255)

  def step():
    clean = images.float()
    adv = attacked(clean.clone()) if kind == 'advprop' else None
    optimizer.zero_grad(set_to_none=True)
    with autocast:
      value = loss(0, clean, task.label_smoothing)
      if adv is not None:
        value = (value + loss(1, adv, task.label_smoothing)) / 2
    value.backward()
    optimizer.step()

  return net, step


def start(
  kind: str, task: Task, device: str, compiles: bool
) -> tuple[Callable[[int], None], float, int | None, None, str]:
  """Makes a step and warms it up: the fields of a `turns.Started`.

  A CPU uses one thread or all cores, whichever is faster: where other work runs
  too, threads that wait for each other can be several times slower.
  """
  on_gpu = device == 'cuda'
  cores = len(os.sched_getaffinity(0))
  threads = cores
  if on_gpu:
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision('high')  # TF32, as XLA's default
    torch.backends.cudnn.allow_tf32 = True
  before = torch.cuda.memory_allocated() if on_gpu else 0
  begin = time.perf_counter()
  _, step = make_step(kind, task, device, compiles)

  def take(count):
    torch.set_num_threads(threads)
    for _ in range(count):
      step()
    if on_gpu:
      torch.cuda.synchronize()

  def best():
    times = []
    for _ in range(WARM_UP_STEPS + 1):
      start = time.perf_counter()
      take(1)
      times.append(time.perf_counter() - start)
    return min(times)

  take(1)
  seconds = time.perf_counter() - begin
  if not on_gpu:
    found = {}
    for threads in sorted({1, cores}):
      found[threads] = best()
    threads = min(found, key=found.get)
    return take, seconds, None, None, f'{threads} of {cores} threads'
  take(WARM_UP_STEPS)
  torch.cuda.reset_peak_memory_stats()
  take(1)
  peak = torch.cuda.max_memory_allocated() - before
  return take, seconds, peak, None, 'compiled' if compiles else ''


def release() -> None:
  """Gives back to the device what PyTorch keeps for later."""
  gc.collect()
  if torch.cuda.is_available():
    torch.cuda.empty_cache()
