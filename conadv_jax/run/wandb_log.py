"""What a run shows on Weights & Biases, if `wandb_project` asks for it."""

from __future__ import annotations

import importlib.util
import io
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from PIL import Image

from conadv_jax import hosts
from conadv_jax.base import storage
from conadv_jax.base.fields import check

_CLOSE_SECONDS = 60


def check_installed(project: str) -> None:
  """Raises ConfigError if `wandb_project` is set and wandb is not there."""
  check(
    not project or importlib.util.find_spec('wandb') is not None,
    'wandb_project',
    project,
    "wandb is not installed: pip install 'conadv_jax[wandb]'",
  )


class WandbLog:
  """One run on Weights & Biases, which every start of ours continues.

  A thread sends, so that the network delays no step. An error of wandb ends the
  log and is printed; the training continues. Steps that a resumed run repeats
  are there twice. `WANDB_MODE=offline` keeps all in the work directory.
  """

  def __init__(self, project: str, workdir: epath.Path):
    self._queue: queue.SimpleQueue[Callable | None] = queue.SimpleQueue()
    self._thread = threading.Thread(
      target=self._send, args=(project, workdir), daemon=True
    )
    self._thread.start()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each tag."""
    row = dict(values) | {'step': step}
    self._queue.put(lambda wandb, run: run.log(row))

  def settings(self, step: int, values: Mapping[str, Any]) -> None:
    """Sets the configuration of the run."""
    del step  # The last start's settings are shown.
    self._queue.put(
      lambda wandb, run: run.config.update(values, allow_val_change=True)
    )

  def image(self, step: int, tag: str, png: bytes) -> None:
    """Shows a PNG file."""
    image = Image.open(io.BytesIO(png))
    self._queue.put(
      lambda wandb, run: run.log({tag: wandb.Image(image), 'step': step})
    )

  def flush(self) -> None:
    """Nothing to do: the thread sends what it has as fast as it can."""

  def close(self) -> None:
    """Waits a minute for what is not sent."""
    self._queue.put(None)
    self._thread.join(_CLOSE_SECONDS)
    if self._thread.is_alive():
      hosts.say('wandb: not all was sent; `wandb sync` may send the rest')

  def _send(self, project: str, workdir: epath.Path) -> None:
    try:
      import wandb  # in this thread, as it takes a second

      local = not storage.is_remote(workdir)
      run = wandb.init(
        project=project,
        name=workdir.name,
        id=_identity(workdir),
        resume='allow',
        dir=str(workdir) if local else None,
      )
      run.define_metric('step')
      run.define_metric('*', step_metric='step')
      for send in iter(self._queue.get, None):
        send(wandb, run)
      run.finish()
    except Exception as error:  # noqa: BLE001
      hosts.say(f'wandb: nothing is logged there any more: {error!r}')


def _identity(workdir: epath.Path) -> str:
  """The name of the run for wandb, kept in `wandb_id` of the directory."""
  path = workdir / 'wandb_id'
  if not path.exists():
    storage.write_text(path, uuid.uuid4().hex)
  return storage.read(path.read_text, path)
