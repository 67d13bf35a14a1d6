"""Where numbers go: `metrics.jsonl`, who shows them, the progress line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from conadv_jax import hosts
from conadv_jax.base import storage
from conadv_jax.config import Config, flatten, to_dict
from conadv_jax.run.appended import AppendedFile
from conadv_jax.run.events import Events
from conadv_jax.run.wandb_log import WandbLog

# Values that two runs of the same configuration do not share.
TIMINGS = (
  'images_per_sec', 'input_wait_percent', 'seconds', 'goodput_percent',
  'mfu_percent',
)  # fmt: skip


class MetricWriter:
  """Adds to `metrics.jsonl`; TensorBoard gets the same values.

  So does Weights & Biases, if there is a `project`. A line is a JSON object:
  `step`, `split`, then the values in order. When a run resumes at `start_step`,
  lines of later steps are dropped, so that every step is in the file once, and
  TensorBoard shows it once. `AppendedFile` says when a line is in the file, and
  what its methods, and so those here, raise.
  """

  def __init__(self, workdir: epath.Path, start_step: int, project: str = ''):
    path = epath.Path(workdir) / 'metrics.jsonl'
    kept = [r for r in read_metrics(workdir) if r['step'] <= start_step]
    self.seconds_before = max((r.get('seconds', 0) for r in kept), default=0)
    self._lines = AppendedFile(path, b''.join(map(_line, kept)))
    self._shown = [Events(path.parent, start_step + 1)]
    if project:
      self._shown.append(WandbLog(project, path.parent))

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Writes numbers and strings; TensorBoard gets the numbers.

    A number that is not finite is written as null, as JSON has no such number.
    """
    values = {name: _plain(value) for name, value in values.items()}
    self._lines.append(_line({'step': step, 'split': split, **values}))
    scalars = {
      f'{split}/{name}': value
      for name, value in values.items()
      if isinstance(value, int | float)
    }
    for shown in self._shown:
      shown.scalars(step, scalars)

  def settings(self, step: int, config: Config) -> None:
    """Shows the settings, by which runs are compared."""
    for shown in self._shown:
      shown.settings(step, flatten(to_dict(config)))

  def pictures(self, step: int, files: Iterable[epath.Path]) -> None:
    """Shows PNG files, under their names."""
    for path in files:
      png = storage.read(path.read_bytes, path)
      for shown in self._shown:
        shown.image(step, f'plots/{path.stem}', png)

  def flush(self) -> None:
    """Puts all lines into the files, before a checkpoint that needs them."""
    self._lines.flush()
    for shown in self._shown:
      shown.flush()

  def close(self) -> None:
    self._lines.close()
    for shown in self._shown:
      shown.close()


class NoWriter:
  """The `MetricWriter` of a host that writes nothing."""

  seconds_before = 0.0

  def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
    """Leaves the values to host 0, which has the same."""

  def settings(self, step: int, config: Config) -> None:
    """Leaves them to host 0, too."""

  def pictures(self, step: int, files: Iterable[epath.Path]) -> None:
    """Leaves them to host 0, too."""

  def flush(self) -> None:
    """Nothing is pending."""

  def close(self) -> None:
    """Nothing is open."""


Writer = MetricWriter | NoWriter


def make_writer(
  workdir: epath.Path, start_step: int, project: str = ''
) -> Writer:
  """Makes the writer of this host: host 0 writes, the others do not.

  Args:
    workdir: of the run.
    start_step: that this start begins after.
    project: of Weights & Biases; '' for none.
  """
  if hosts.is_writer():
    return MetricWriter(workdir, start_step, project)
  return NoWriter()


def read_metrics(workdir: epath.Path) -> list[dict[str, Any]]:
  """Reads the rows of `metrics.jsonl`; a last line that was cut is left out."""
  path = epath.Path(workdir) / 'metrics.jsonl'
  if not path.exists():
    return []
  rows = []
  for line in storage.read(path.read_text, path).splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def has_row(workdir: epath.Path, step: int, split: str) -> bool:
  """Whether `metrics.jsonl` has a row of `split` at `step`, as host 0 sees."""
  return hosts.on_writer(
    'metrics.jsonl',
    lambda: any(
      (row['step'], row['split']) == (step, split)
      for row in read_metrics(workdir)
    ),
  )


class Progress:
  """Measures speed since the last report; pauses do not count."""

  def __init__(
    self,
    start_step: int,
    stop_step: int,
    batch_size: int,
    waited_seconds: float = 0.0,
  ):
    self.stop_step = stop_step
    self._batch_size = batch_size
    self._step = self._start_step = start_step
    self._waited = waited_seconds  # for input, before the first step
    self._since = time.monotonic()
    self.seconds = 0.0  # spent training, over all reports

  def report(self, step: int, waited_seconds: float) -> dict[str, float]:
    """Returns `images_per_sec` and the share of time spent on input."""
    now = time.monotonic()
    elapsed = max(now - self._since, 1e-9)
    images = (step - self._step) * self._batch_size
    rates = {
      'images_per_sec': images / elapsed,
      'input_wait_percent': 100 * (waited_seconds - self._waited) / elapsed,
    }
    self.seconds += elapsed
    self._step, self._waited, self._since = step, waited_seconds, now
    return rates

  @contextlib.contextmanager
  def paused(self):
    """Around work that is not training, such as an evaluation."""
    start = time.monotonic()
    yield
    self._since += time.monotonic() - start

  def eta(self, step: int | None = None) -> str:
    """Time left, 'h:mm:ss', at the mean rate so far.

    Args:
      step: that the run is at; None is that of the last report.
    """
    seconds = self.seconds
    if step is None:
      step = self._step
    else:
      seconds += time.monotonic() - self._since
    if step == self._start_step:
      return '?'
    per_step = seconds / (step - self._start_step)
    return clock((self.stop_step - step) * per_step)


def clock(seconds: float) -> str:
  """12345.6 -> '3:25:46'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def _line(row: Mapping[str, Any]) -> bytes:
  return (json.dumps(row) + '\n').encode()


def _plain(value: Any) -> Any:
  """Numbers of any library -> int, float, or None if not finite, for JSON."""
  if isinstance(value, str):
    return value
  value = np.asarray(value).item()
  return value if np.isfinite(value) else None
