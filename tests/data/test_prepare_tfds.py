"""What scripts/prepare_tfds.py asks TFDS for; TFDS does the rest."""

import sys
from unittest import mock

import pytest
import tensorflow_datasets as tfds

from scripts import prepare_tfds


def prepare(monkeypatch, builder, *flags):
  monkeypatch.setattr(tfds, 'builder', builder)
  monkeypatch.setattr(sys, 'argv', ['prepare_tfds.py', *flags])
  return prepare_tfds.main()


@pytest.mark.parametrize(
  'flags, data_dir, file_format, manual_dir',
  [
    (['--name=cifar10'], None, 'array_record', None),
    (
      ['--name=imagenet2012', '--data_dir=d', '--manual_dir=m',
       '--file_format=tfrecord'],
      'd', 'tfrecord', 'm',
    ),
  ],
)  # fmt: skip
def test_a_builder_gets_what_the_flags_say(
  flags, data_dir, file_format, manual_dir, monkeypatch, capsys
):
  builder = mock.MagicMock()
  builder.return_value.data_dir = 'there'
  assert prepare(monkeypatch, builder, *flags) == 0
  name = flags[0].removeprefix('--name=')
  builder.assert_called_once_with(
    name, data_dir=data_dir, file_format=file_format
  )
  ((), asked) = builder.return_value.download_and_prepare.call_args
  assert asked['download_config'].manual_dir == manual_dir
  assert capsys.readouterr().out == 'there\n'


def test_a_failure_is_an_error_without_a_traceback(monkeypatch, capsys):
  builder = mock.MagicMock(side_effect=OSError('no space'))
  assert prepare(monkeypatch, builder, '--name=cifar10') == 1
  assert capsys.readouterr().err == 'error: no space\n'
