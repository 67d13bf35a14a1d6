"""ArrayRecord files that are damaged, far away, or on storage that fails."""

import contextlib
import http.server
import os
import pathlib
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest
import record_files
from array_record.python import array_record_module
from record_files import RECORDS, write, write_array_record

from conadv_jax.base.errors import ConfigError, StorageError
from conadv_jax.data.sources import array_record, records

no_delay = record_files.no_delay


def cut_half(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_end(path):
  path.write_bytes(path.read_bytes()[:-100])


def one_less(path):
  write_array_record(path, RECORDS[8:14])


def one_more(path):
  write_array_record(path, RECORDS[8:16])


def other_file(path):
  path.write_bytes(np.random.RandomState(0).bytes(200_000))


@pytest.mark.parametrize(
  ('change', 'found'),
  [
    (cut_half, '0 records,'),
    (cut_end, r'0 records \(Corrupted .*\),'),
    (one_less, '6 records,'),
    (one_more, '8 records,'),
    (other_file, r'0 records \(Corrupted .*\),'),
  ],
)
def test_array_record_files_of_another_count_are_refused(
  tmp_path, change, found
):
  paths, lengths = write(tmp_path, 'array_record')
  change(paths[3])
  with pytest.raises(ConfigError, match=f'holds {found}') as error:
    array_record.ArrayRecords(paths, lengths)
  assert str(paths[3]) in str(error.value)
  assert 'dataset_info.json records 7 records' in str(error.value)


def test_a_bucket_that_cannot_be_opened_is_no_damaged_file(monkeypatch):
  monkeypatch.setattr(records, 'file_size', lambda path: 1)
  with pytest.raises(ConfigError, match='cannot be opened .*gcsfuse'):
    array_record.ArrayRecords(['other://bucket/file'], [1])


class FailingReader:
  """Fails like a filesystem, for the first `failures` reads of all readers."""

  failures = 0

  original = array_record_module.ArrayRecordReader

  def __init__(self, path, **kwargs):
    self._reader = FailingReader.original(path, **kwargs)

  def __getattr__(self, name):
    return getattr(self._reader, name)

  def read(self, places):
    if FailingReader.failures:
      FailingReader.failures -= 1
      raise RuntimeError('Input/output error reading /mnt/x')
    return self._reader.read(places)


def test_failing_storage_is_asked_again_and_is_never_a_bad_record(
  tmp_path, monkeypatch, no_delay
):
  paths, lengths = write(tmp_path, 'array_record')
  source = array_record.ArrayRecords(paths, lengths, max_open_files=1)
  monkeypatch.setattr(
    array_record.array_record_module, 'ArrayRecordReader', FailingReader
  )
  FailingReader.failures = 4
  assert source.fetch(np.array([3])) == [RECORDS[3]]
  FailingReader.failures = 5
  with pytest.raises(StorageError, match='Input/output error') as info:
    source.fetch(np.array([8]))
  FailingReader.failures = 0
  assert source.fetch(np.array([8])) == [RECORDS[8]]
  assert not source.why_unreadable(8)
  assert str(info.value).startswith(f'{paths[3]}: cannot be read: ')


class FakeBucket(http.server.BaseHTTPRequestHandler):
  """Serves local files as the bucket `fake`, in the way of Cloud Storage."""

  def do_GET(self):
    name = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
    path = pathlib.Path(name.removeprefix('/storage/v1/b/fake/o'))
    if not path.exists():
      self.send_error(404)
      return
    data = path.read_bytes()
    first, last = self.headers['Range'].removeprefix('bytes=').split('-')
    start = int(first) if first else max(0, len(data) - int(last))
    stop = int(last) + 1 if first and last else len(data)
    self.send_response(206)
    self.send_header('Content-Range', f'bytes {start}-{stop - 1}/{len(data)}')
    self.send_header('Content-Length', str(stop - start))
    self.end_headers()
    with contextlib.suppress(
      OSError
    ):  # The reader hangs up when it has enough.
      self.wfile.write(data[start:stop])

  def log_message(self, *arguments):
    del arguments


def test_array_record_files_are_read_from_a_bucket(tmp_path):
  paths, lengths = write(tmp_path, 'array_record')
  code = f"""
import numpy as np
from conadv_jax.data.sources import array_record, records
records.file_size = lambda path: 1  # tensorflow asks the real Cloud Storage.
paths = {[f'gs://fake{path}' for path in paths]}
source = array_record.ArrayRecords(paths, {lengths})
print(b''.join(source.fetch(np.arange(19)[::-1])).hex())
"""
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), FakeBucket)
  threading.Thread(target=server.serve_forever).start()
  address = f'http://127.0.0.1:{server.server_port}'
  kept = {k: v for k, v in os.environ.items() if 'proxy' not in k.lower()}
  try:
    done = subprocess.run(
      [sys.executable, '-c', code],
      env=kept | {'CLOUD_STORAGE_EMULATOR_ENDPOINT': address},
      cwd=pathlib.Path(__file__).parents[2],
      stdout=subprocess.PIPE,
      text=True,
      timeout=60,
      check=True,
    )
  finally:
    server.shutdown()
    server.server_close()
  assert bytes.fromhex(done.stdout) == b''.join(RECORDS[::-1])
