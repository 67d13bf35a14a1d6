"""Files that are not images: how many a run allows, and what it reports."""

import json
import os
import pathlib
import subprocess
import sys

import odd_images
import pytest
from PIL import Image

from conadv_jax.base.errors import DataError
from conadv_jax.config import default_config, from_config_dict
from conadv_jax.data import datasets
from conadv_jax.data.images import kinds
from conadv_jax.data.quarantine import Quarantine
from conadv_jax.data.sources.source import Share

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Of a process that reads a folder, whose stderr is that of a user.
_READ = 'import sys, test_bad_files; test_bad_files.read(*sys.argv[1:])'


def read(root, kind):
  """Trains on a folder with damaged files; writes ROOT/q.jsonl."""
  values = default_config()
  values.dataset.name = 'image_folder'
  values.dataset.data_dir = str(root)
  values.dataset.image_size_px = 8
  values.dataset.cache = kind
  config = from_config_dict(values).dataset
  spec = datasets.resolve(config)
  # After `datasets`, as in a run: it sets what TensorFlow logs.
  from conadv_jax.data import pipeline

  batches = pipeline.train_batches(
    spec.open('train', config),
    config,
    Share(0, 5, range(4)),
    image_views=('clean',),
    num_classes=spec.num_classes,
    quarantine=Quarantine(f'{root}/q.jsonl', max_share=0.5),
  )
  assert len(list(batches)) == 4


@pytest.fixture
def folder(tmp_path):
  """Ten files, of which four are bad: (root, {path: content})."""
  image = odd_images.encode(Image.new('RGB', (9, 9), (50,) * 3))
  bad = {
    '2.jpg': b'',
    '3.jpg': b'<!DOCTYPE html><p>404',
    '5.jpg': odd_images.encode(Image.new('RGB', (9, 9)), 'GIF'),
    '7.jpg': image[:-20],
  }
  for split in ('train', 'val'):
    (tmp_path / split / 'a').mkdir(parents=True)
    for name in (f'{i}.jpg' for i in range(10)):
      content = bad.get(name, image) if split == 'train' else image
      (tmp_path / split / 'a' / name).write_bytes(content)
  return tmp_path, [f'{tmp_path}/train/a/{name}' for name in bad]


@pytest.mark.parametrize(
  'cache', ['none', 'raw', pytest.param('decoded', marks=pytest.mark.slow)]
)
def test_a_row_has_the_place_and_the_reason_apart(cache, folder, capsys):
  root, bad = folder
  read(root, cache)
  lines = (root / 'q.jsonl').read_text().splitlines()
  rows = {row['place']: row['reason'] for row in map(json.loads, lines)}
  assert sorted(rows) == sorted(bad)
  reasons = [rows[path] for path in bad]
  only = 'neither JPEG, PNG nor WebP, which alone are read, but this:'
  assert reasons[:3] == [
    'the file is empty', f'{only} HTML or XML', f'{only} GIF'
  ]  # fmt: skip
  assert 'JPEG' in reasons[3]
  said = capsys.readouterr().out
  for path, reason in rows.items():
    assert f'{path}: {reason}' in said


@pytest.mark.slow
def test_tensorflow_adds_no_lines_of_its_own(folder):
  root, bad = folder
  done = subprocess.run(
    [sys.executable, '-c', _READ, root, 'none'],
    cwd=ROOT / 'tests/data',
    env=os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT}/tests'},
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'rendezvous' not in done.stderr
  assert done.stdout.count('bad example') == len(bad)


@pytest.mark.parametrize(
  'file_format, name',
  [('GIF', 'GIF'), ('BMP', 'BMP'), ('TIFF', 'TIFF')],
)
def test_files_of_pil_are_known(file_format, name):
  data = odd_images.encode(odd_images.photo(20, 20), file_format)
  assert kinds.name_of(data[:24]) == name


@pytest.mark.parametrize(
  'start, name',
  [
    (b'', 'empty'),
    (b'hello\n', 'text'),
    (b'\xef\xbb\xbfh\xc3\xa9', 'text'),
    (b' <HTML><body>', 'HTML or XML'),
    (b'%PDF-1.7', 'PDF'),
    (b'PK\x03\x04..', 'zip'),
    (b'\x1f\x8b\x08', 'gzip'),
    (b'\0\0\0\x18ftypheic', 'HEIC'),
    (b'\0\0\0\x18ftypavif', 'AVIF'),
    (b'\0\x01\xfe' * 8, 'starts with 0001fe0001fe0001'),
  ],
)
def test_the_kind_of_a_file(start, name):
  assert kinds.name_of(start) == name


def add(quarantine, bad, of):
  for i in range(bad):
    quarantine.add('train', i, f'file{i}', 'bad', of=of)


@pytest.mark.parametrize(
  'share, of, allowed',
  [
    (0.001, 100, 3),
    (0.001, 999, 3),
    (0.001, 10_000, 10),
    (0.1, 100, 10),
    (0.001, 3, 2),  # not all of them
    (0.99, 1, 0),
    (0.0, 100, 0),
    (0.0, 10**6, 0),
  ],
)
def test_a_few_bad_files_do_not_end_a_run_on_a_small_set(share, of, allowed):
  add(Quarantine(max_share=share), allowed, of)
  with pytest.raises(DataError, match=rf'allows \({allowed}\)'):
    add(Quarantine(max_share=share), allowed + 1, of)
