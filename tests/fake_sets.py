"""Small fake copies of other test sets of ImageNet, in TFDS's own schemas."""

import contextlib
import importlib
import io

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from scripts.make_fake_imagenet import synsets


def prepare(root, name, labels, config='', seed=0, size=(40, 30), sets=None):
  """Writes `root`/NAME[/CONFIG]/VERSION with an image of noise for each label.

  Args:
    root: a TFDS data directory.
    name: of the data set in TFDS.
    labels: of the examples, 0 to 999.
    config: of the builder.
    seed: keys the images.
    size: (width, height) of each.
    sets: ReaL labels of each example.

  Returns:
    The images before they were encoded, as PNG so that nothing is lost.
  """
  module = importlib.import_module(
    f'tensorflow_datasets.datasets.{name}.{name}_dataset_builder'
  )
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (len(labels), *size[::-1], 3)).astype(np.uint8)

  def info(self):
    real = module.Builder._info(self)
    return tfds.core.DatasetInfo(
      builder=self, features=real.features, description='fake'
    )

  def examples():
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
      file = io.BytesIO()
      Image.fromarray(pixels).save(file, 'PNG')
      file.seek(0)
      example = {'image': file, 'file_name': f'{i}.JPEG'}
      if sets is None:
        example['label'] = synsets()[label]
      else:
        example['original_label'] = synsets()[label]
        example['real_label'] = list(sets[i])
      yield str(i), example

  split = 'validation' if name.startswith('imagenet2012') else 'test'
  members = {
    'name': name,
    'pkg_dir_path': epath.Path(__file__).parent,
    '__module__': __name__,
    '_info': info,
    '_split_generators': lambda self, _: {split: examples()},
    '_generate_examples': None,
  }
  cls = type('Fake', (module.Builder,), members, skip_registration=True)
  builder = cls(
    data_dir=str(root), file_format='array_record', config=config or None
  )
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
  return images
