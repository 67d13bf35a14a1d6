"""Records for TensorBoard: scalars, settings and pictures."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from PIL import Image
from tensorboard.compat.proto import (
  event_pb2,
  summary_pb2,
  tensor_pb2,
  types_pb2,
)
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.summary.writer.record_writer import RecordWriter

from conadv_jax.run.appended import AppendedFile

# What the table of runs has beside their settings.
_RESULTS = ('test/top1', 'test_fgsm/top1', 'test_pgd/top1')


class Events:
  """A file of events, whose methods raise what those of `AppendedFile` do."""

  def __init__(self, workdir: epath.Path, first_step: int):
    """Tells TensorBoard to drop what earlier starts wrote from `first_step` on.

    The first start has to say so, too: TensorBoard passes over the first mark.
    """
    # TensorBoard reads files in the order of their names.
    began = f'{time.time():020.9f}'
    name = f'events.out.tfevents.{began}.{socket.gethostname()}'
    self._file = AppendedFile(workdir / name)
    self._add(0, file_version='brain.Event:2')
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(first_step, session_log=start)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a point to the curve of each tag."""
    self._summarize(
      step,
      *(
        summary_pb2.Summary.Value(tag=tag, simple_value=value)
        for tag, value in values.items()
      ),
    )

  def settings(self, step: int, values: Mapping[str, Any]) -> None:
    """Shows settings as a page of text and as hparams, which tell runs apart.

    Args:
      step: at which they hold.
      values: by name, of any type.
    """
    lines = (f'| {name} | `{value!r}` |' for name, value in values.items())
    text = '\n'.join(['| setting | value |', '|---|---|', *lines])
    metadata = summary_pb2.SummaryMetadata(
      plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name='text'),
      data_class=summary_pb2.DATA_CLASS_TENSOR,
    )
    tensor = tensor_pb2.TensorProto(
      dtype=types_pb2.DT_STRING, string_val=[text.encode()]
    )
    page = summary_pb2.Summary.Value(
      tag='settings', metadata=metadata, tensor=tensor
    )
    plain = {
      name: value if isinstance(value, bool | int | float | str) else str(value)
      for name, value in values.items()
    }
    results = [hparams.Metric(tag) for tag in _RESULTS]
    columns = hparams.hparams_config_pb(map(hparams.HParam, plain), results)
    row = hparams.hparams_pb(plain)
    self._summarize(step, page, *columns.value, *row.value)

  def image(self, step: int, tag: str, png: bytes) -> None:
    """Shows a PNG file."""
    width, height = Image.open(io.BytesIO(png)).size
    image = summary_pb2.Summary.Image(
      encoded_image_string=png, width=width, height=height, colorspace=4
    )
    self._summarize(step, summary_pb2.Summary.Value(tag=tag, image=image))

  def flush(self) -> None:
    """Puts all events into the file."""
    self._file.flush()

  def close(self) -> None:
    """Flushes; nothing can be added any more."""
    self._file.close()

  def _summarize(self, step: int, *values: summary_pb2.Summary.Value) -> None:
    self._add(step, summary=summary_pb2.Summary(value=values))

  def _add(self, step: int, **content: Any) -> None:
    event = event_pb2.Event(wall_time=time.time(), step=step, **content)
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    self._file.append(record.getvalue())
