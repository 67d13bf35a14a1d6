"""ArrayRecord files under pressure: few open files, many threads."""

import concurrent.futures
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from array_record.python import array_record_module
from record_files import RECORDS, write

from conadv_jax.data.sources import array_record
from conadv_jax.data.sources.array_record import ArrayRecords

COUNT = 300  # files of two records


def record_of(example_id):
  return b'record %d' % example_id


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
  root = tmp_path_factory.mktemp('array_record')
  found = [root / f'{i}' for i in range(COUNT)]
  for i, path in enumerate(found):
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    writer.write(record_of(2 * i))
    writer.write(record_of(2 * i + 1))
    writer.close()
  return found


PROGRAM = """
import os, resource, sys
import numpy as np
root, count, hard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if not hard:
  hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
from conadv_jax.data.sources.array_record import ArrayRecords
source = ArrayRecords([f'{root}/{i}' for i in range(count)], [2] * count)
ids = np.random.RandomState(0).permutation(2 * count)
assert source.fetch(ids) == [b'record %d' % i for i in ids]
print(len(os.listdir('/proc/self/fd')))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
@pytest.mark.parametrize('hard', [100, 0], ids=['firm', 'raised'])
def test_more_files_than_may_be_open(paths, hard):
  """Files make room for others, or the limit is raised and all stay open."""
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, paths[0].parent, str(COUNT), str(hard)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert (int(done.stdout) > COUNT) == (not hard)


def test_open_files_are_bounded(tmp_path):
  def count():
    links = [
      os.path.realpath(f'/proc/self/fd/{fd}')
      for fd in os.listdir('/proc/self/fd')
    ]
    return sum(link.startswith(str(tmp_path)) for link in links)

  if not pathlib.Path('/proc/self/fd').exists():
    pytest.skip('needs /proc')
  paths, lengths = write(tmp_path, 'array_record', (1,) * 12)
  source = ArrayRecords(paths, lengths, max_open_files=3)
  assert count() == 3
  for _ in range(3):
    assert source.fetch(np.arange(12)) == RECORDS[:12]
    assert count() == 3
  del source
  assert count() == 0


def test_a_low_limit_of_open_files_is_raised_or_kept(monkeypatch):
  limits = {}

  def run(soft, hard, wanted):
    monkeypatch.setattr(
      array_record.resource, 'getrlimit', lambda _: (soft, hard)
    )
    monkeypatch.setattr(
      array_record.resource,
      'setrlimit',
      lambda _, limit: limits.update(set=limit),
    )
    limits.clear()
    return array_record._raise_open_files(wanted), limits.get('set')

  assert run(1024, 4096, 1024) == (1024, (1536, 4096))
  assert run(1024, 1200, 1024) == (944, (1200, 1200))
  assert run(4096, 4096, 1024) == (1024, None)
  assert run(1024, -1, 1024) == (1024, (1536, -1))
  assert run(-1, -1, 1024) == (1024, None)
  assert run(100, 100, 1024)[0] == 1


@pytest.mark.parametrize('max_open_files', [3, 300])
def test_many_threads_at_once(paths, max_open_files):
  source = ArrayRecords(
    paths, [2] * COUNT, max_open_files=max_open_files, num_threads=4
  )
  asked = [np.random.RandomState(i).randint(24, size=32) for i in range(500)]
  old = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)  # Threads interrupt each other everywhere.
  try:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
      found = list(pool.map(source.fetch, asked))
  finally:
    sys.setswitchinterval(old)
  assert found == [[record_of(i) for i in ids] for ids in asked]
  assert len(source._open) == min(max_open_files, COUNT)
