"""Keeps compiled programs on disk, so that a rerun compiles only new ones."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import time
from typing import Any

from etils import epath

from conadv_jax import experiment
from conadv_jax.audit.compile import (
  Compiled,
  Lowered,
  compile_step,
  lower_step,
  report,
  versions,
)
from conadv_jax.audit.libtpu import load_devices
from conadv_jax.config import Config
from conadv_jax.devices.topology import Topology
from conadv_jax.experiment import Run


class Auditor:
  """Audits configurations and compiles each of them once."""

  def __init__(self, folder: epath.Path | None, total: int = 1):
    """Keeps programs in `folder`, if given; expects `total` of them."""
    self._folder = folder
    self._total = total
    self._done = 0
    self._start = time.monotonic()

  def __call__(self, config: Config, topology: Topology) -> dict[str, Any]:
    """Reports on the step of `config` on `topology`, see `compile.report`.

    Raises:
      ConfigError: for a configuration that does not divide over the slice, or
        if libtpu is missing.
    """
    run = experiment.build(config, load_devices(topology))
    title = (
      f'{config.model}, {config.method}, batch {config.batch_size:,}, '
      f'microbatches {config.microbatches}, remat {config.remat}, on '
      f'{topology.label}'
    )
    lowered = lower_step(run)
    path = self._path(run, topology, lowered)
    if path is not None and path.exists():
      print(f'{title}: compiled before', flush=True)
      compiled = _read(path)
    else:
      print(f'{title}: compiling{self._eta()} ...', flush=True)
      compiled = compile_step(run, lowered)
      outcome = compiled.error.splitlines()[0] if compiled.error else 'compiled'
      print(f'  {outcome}, {compiled.compile_seconds:.0f} s', flush=True)
      if path is not None:
        _write(path, compiled)
    self._done += 1
    return report(run, topology, compiled)

  def _eta(self) -> str:
    left = self._total - self._done
    if left <= 1 or not self._done:
      return ' (minutes for a large network)'
    seconds = (time.monotonic() - self._start) / self._done * left
    return f' ({self._done + 1} of {self._total}, {seconds / 60:.0f} min left)'

  def _path(
    self, run: Run, topology: Topology, lowered: Lowered
  ) -> epath.Path | None:
    """The file of a program, named by everything that determines it."""
    if self._folder is None:
      return None
    key = (
      lowered.step.as_text(),
      topology.label,
      run.compiler_options,
      versions(),
    )
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return self._folder / f'{name[:16]}.json.gz'


def _write(path: epath.Path, compiled: Compiled) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  content = json.dumps(dataclasses.asdict(compiled)).encode()
  temporary = path.parent / (path.name + '.tmp')
  temporary.write_bytes(gzip.compress(content))
  temporary.replace(path)


def _read(path: epath.Path) -> Compiled:
  return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
