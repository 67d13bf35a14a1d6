"""What one host checks by itself; `CHECKS` lists it in order.

A check returns the fact that it found. It raises a CommandError that names the
remedy, or `Skipped` if it needs what an earlier check did not find.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from conadv_jax import cli, experiment, hosts
from conadv_jax.audit.report import bytes_text
from conadv_jax.base import storage
from conadv_jax.base.errors import ConfigError
from conadv_jax.checkpoints import files
from conadv_jax.config import Config, from_config_dict
from conadv_jax.data import datasets, pipeline, slices
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Share, Source
from conadv_jax.data.spec import DatasetSpec
from conadv_jax.devices.generations import peak_flops_per_sec
from conadv_jax.experiment import Run
from conadv_jax.hosts import private
from conadv_jax.run import equal_hosts, provenance, wandb_log, workdir
from conadv_jax.run.lock import RunLock

_INPUT_SECONDS = 3  # that are measured
_INPUT_BATCH = 128  # examples, of which every host has others
# A step of convolutions takes at least twice as long as its FLOPs at the peak
# of the devices: memory binds it (docs/tpu.md).
_ATTAINABLE = 0.5
_BATCHES = 4  # on the devices: this one, the next, and two prefetched
# The owner of a lock on another machine shows signs of life every 11 s.
_LOCK_SECONDS = 13


class Skipped(Exception):
  """A check that cannot be made; the message says what it needs."""


@dataclasses.dataclass
class Subject:
  """The run that may start, as far as checks have found it.

  Attributes:
    argv: `--config`, `--workdir` and overrides.
    step_seconds: what a step takes; None if nobody said.
    local: the devices of this host.
    facts: what must be equal on all hosts.
    token: what this host wrote into the work directory; '' if it could not.
  """

  argv: Sequence[str]
  step_seconds: float | None = None
  config: Config | None = None
  local: list[jax.Device] | None = None
  spec: DatasetSpec | None = None
  source: Source | None = None
  data: provenance.Data | None = None
  run: Run | None = None
  path: epath.Path | None = None
  facts: dict[str, Any] | None = None
  token: str = ''

  def needs(self, *names: str) -> None:
    """Raises Skipped unless there are all of `names`."""
    words = {
      'config': 'a good configuration', 'local': 'devices',
      'spec': 'a known data set', 'source': 'a good data set',
      'run': 'a batch that divides', 'path': 'a work directory',
    }  # fmt: skip
    if missing := [
      words[name] for name in names if getattr(self, name) is None
    ]:
      raise Skipped(f'needs {" and ".join(missing)}')


@dataclasses.dataclass(frozen=True)
class Check:
  """One check.

  Attributes:
    name: begins its line.
    find: makes it.
    seconds: that it may take.
    remedy: should it take longer, or fail by an error that has no remedy.
    of_writer: whether host 0 alone makes it.
  """

  name: str
  find: Callable[[Subject], str]
  seconds: float
  remedy: str
  of_writer: bool = False


def _config(subject: Subject) -> str:
  values, _ = cli.parse_config_file(subject.argv)
  subject.config = config = from_config_dict(values)
  return (
    f'{config.model}, {config.method}, batch {config.batch_size:,}, data set '
    f'{config.dataset.name}'
  )


def _devices(subject: Subject) -> str:
  local = jax.local_devices()
  name = local[0].platform
  if private.on_tpu_vm() and name != 'tpu' and jax.config.jax_platforms != name:
    raise ConfigError(
      f'this machine has TPUs, but JAX found {name} only; install libtpu with '
      "pip install -e '.[tpu]', and end what else uses the TPUs; or set "
      f'JAX_PLATFORMS={name} if you mean it'
    )
  subject.local = local
  return (
    f'{len(local)} x {local[0].device_kind} ({name}) of {jax.device_count()}; '
    f'hosts: {hosts.count()}'
  )


def _versions(subject: Subject) -> str:
  found = workdir.versions()
  if private.on_tpu_vm() and 'libtpu' not in found:
    raise ConfigError(
      'this machine has TPUs, but no libtpu; install it with pip install -e '
      "'.[tpu]'"
    )
  if subject.config and subject.local:
    subject.facts = equal_hosts.program(subject.config)
    wandb_log.check_installed(subject.config.wandb_project)
  shown = ('jax', 'jaxlib', 'libtpu', 'flax', 'orbax-checkpoint')
  texts = [f'{name} {found[name]}' for name in shown if name in found]
  return ', '.join([f'python {platform.python_version()}', *texts])


def _dataset(subject: Subject) -> str:
  """Opens the examples, without a cache: that would read all of them."""
  subject.needs('config')
  config = subject.config.dataset
  spec = subject.spec = datasets.resolve(config)
  uncached = dataclasses.replace(config, cache='none')
  source = spec.open('train', uncached)
  evaluated = spec.open('eval', uncached)
  data = provenance.of_examples(
    spec, config.data_dir, train=source, eval=evaluated
  )
  if config.cache != 'none':
    data['shuffled'] = 'as a whole'
  if subject.facts is not None:
    subject.facts |= {f'data.{name}': value for name, value in data.items()}
  subject.source = source
  subject.data = data | {'splits': dict(spec.splits)}
  _check_whole(spec)
  return (
    f'{source.num_examples:,} examples to train on, {evaluated.num_examples:,} '
    'to evaluate'
  )


def _check_whole(spec: DatasetSpec) -> None:
  """Refuses slices that select less than they would of the published data.

  'train[:10000]' is the same of both where there are so many; 'train' and
  'train[:10%]' are not.
  """
  published = datasets.get_spec(spec.name).splits
  for part in ('train', 'eval'):
    field = f'{part}_split'
    text, pieces = getattr(spec, field), spec.pieces(part)
    fewer = [
      name
      for name in slices.names(text)
      if spec.splits[name] < published.get(name, 0)
    ]
    if fewer and pieces != slices.parse(text, spec.splits | published, field):
      raise ConfigError(
        f'{spec.splits[fewer[0]]:,} examples in {fewer[0]!r}, of '
        f'{published[fewer[0]]:,} in the published data set, which '
        f'dataset.{field}={text!r} selects from; prepare all of it '
        '(docs/data.md), or say that you want what is there: '
        f"'--config.dataset.{field}={slices.to_text(pieces)}'"
      )


def _batch(subject: Subject) -> str:
  subject.needs('config', 'spec', 'local')
  subject.run = run = experiment.build(subject.config, spec=subject.spec)
  return (
    f'{run.config.batch_size / run.mesh.size:g} examples on each device; '
    f'microbatches: {run.config.microbatches}, batch-norm groups: '
    f'{run.groups:,}, steps: {run.steps.stop:,}'
  )


def _input(subject: Subject) -> str:
  """Decodes for some seconds, and compares that with what a step needs."""
  subject.needs('run', 'source')
  run = subject.run
  quarantine = Quarantine(max_share=run.config.dataset.max_bad_share)
  rate = _images_per_sec(subject, quarantine)
  fact = f'{rate:,.0f} images/s on this host'
  if quarantine.count('train'):
    fact += f', {quarantine.count("train")} bad examples among them'
  seconds, why = subject.step_seconds, 'as --step_seconds says'
  if seconds is None:
    peak = peak_flops_per_sec(subject.local[0].device_kind)
    if peak is None:
      return f'{fact}; what a step needs is not known, give --step_seconds'
    seconds = run.flops_per_device() / peak / _ATTAINABLE
    why = f'at {100 * _ATTAINABLE:g} % of the peak'
  need = len(run.local_positions()) / seconds
  fact += f', a step takes {need:,.0f} ({seconds:.3g} s {why})'
  if rate < need:
    raise ConfigError(
      f'{fact}; use hosts with more cores, dataset.cache, faster storage, or '
      'accept that the devices wait (docs/input.md)'
    )
  return fact


def _images_per_sec(subject: Subject, quarantine: Quarantine) -> float:
  config, host = subject.config, hosts.index()
  size = min(_INPUT_BATCH, len(subject.run.local_positions()))
  share = Share(
    seed=config.seed,
    batch_size=size * hosts.count(),
    steps=range(2**20),
    positions=np.arange(host * size, (host + 1) * size),
    host=host,
    num_hosts=hosts.count(),
  )
  batches = pipeline.train_batches(
    subject.source,
    config.dataset,
    share,
    image_views=config.fed_views,
    num_classes=subject.spec.num_classes,
    quarantine=quarantine,
  )
  next(batches)  # later ones do not wait for TensorFlow to begin
  start = time.monotonic()
  for count in itertools.count(1):
    next(batches)
    seconds = time.monotonic() - start
    if seconds > _INPUT_SECONDS:
      return size * count / seconds
  raise AssertionError('not reached')


def _memory(subject: Subject) -> str:
  """Bounds the memory of a device from below: its state and images."""
  subject.needs('run')
  state = jax.tree.leaves(subject.run.abstract_state())
  batches = _BATCHES * jax.tree.leaves(subject.run.abstract_batch())
  least = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in [*state, *batches]
  )
  stats = subject.local[0].memory_stats() or {}
  limit = stats.get('bytes_limit')
  of = f' of {bytes_text(limit)}' if limit else ''
  fact = f'state and images take {bytes_text(least)}{of} on each device'
  if limit and least > limit:
    raise ConfigError(
      f'{fact}; use more devices, a smaller batch_size or shard_optimizer'
    )
  return f'{fact}; what is computed comes on top, ask conadv-audit'


def _workdir(subject: Subject) -> str:
  """Writes the file that the other hosts look for."""
  subject.path = path = workdir.path_of(cli.parse_workdir(subject.argv))
  mine, token = token_path(path, hosts.index()), uuid.uuid4().hex
  storage.write(lambda: path.mkdir(parents=True, exist_ok=True), path)
  storage.write(lambda: mine.write_text(token), mine)
  subject.token = token
  return f'{path} can be written'


def token_path(path: epath.Path, host: int) -> epath.Path:
  """The file by which `host` shows that it writes in the work directory."""
  return path / f'.preflight_host{host}'


def _present(subject: Subject) -> str:
  """What training would do about the run that is there."""
  subject.needs('path', 'run', 'source')
  path, run = subject.path, subject.run
  RunLock(path, _LOCK_SECONDS).check_free()
  if not (path / 'config.json').exists():
    return 'none is there, a new one begins'
  workdir.check_same(path, run.config, subject.data)
  step = max(files.committed(files.directory_of(path)), default=0)
  workdir.check_not_past(run, step)
  done = ', the last one' if step == run.steps.stop else ''
  return f'resumes at step {step:,} of {run.steps.stop:,}{done}'


def _disk(subject: Subject) -> str:
  """Compares the free space with the checkpoints that are to come."""
  subject.needs('path', 'run')
  state = subject.run.abstract_state().replace(perturbation=None)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  # An older one is removed when a newer one has been seen.
  there = len(files.committed(files.directory_of(subject.path)))
  keep = subject.config.checkpoint.keep
  need = size * max(1, keep + 1 - there)
  free = storage.free_bytes(subject.path)
  fact = f'{keep} + 1 checkpoints of {bytes_text(size)}'
  if free is None:
    return f'{fact}; how much is free is not known'
  if free < need:
    raise ConfigError(
      f'{bytes_text(free)} free in {subject.path}, {fact} need '
      f'{bytes_text(need)} more; free some space, lower checkpoint.keep, or '
      'use another --workdir'
    )
  return f'{bytes_text(free)} free, {fact}'


_INSTALL = 'install the lock of this version again: make setup'
_DATA = 'check dataset.data_dir, and that this host may read there'
_STORAGE = 'check that the storage of --workdir is there and works'
CHECKS = (
  Check('config', _config, 5, 'mend the recipe or the flags'),
  Check(
    'devices', _devices, 10,
    'end what else uses the devices, and start this on all hosts',
  ),
  Check('versions', _versions, 5, _INSTALL),
  Check('data set', _dataset, 20, _DATA),
  Check('batch', _batch, 10, 'mend the configuration'),
  Check('input', _input, 20, _DATA),
  Check('memory', _memory, 10, 'mend the configuration'),
  Check('workdir', _workdir, 12, _STORAGE),
  Check('run', _present, _LOCK_SECONDS + 3, _STORAGE, of_writer=True),
  Check('disk', _disk, 5, _STORAGE, of_writer=True),
)  # fmt: skip
