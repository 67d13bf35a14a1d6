"""Other test sets for networks that were trained on ImageNet.

All have ImageNet's labels in TFDS, 0 to 999, in the order of `imagenet2012`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from conadv_jax.data.spec import DatasetSpec

if TYPE_CHECKING:
  from conadv_jax.data.sources.records import ShardedRecords

# AlexNet's mean error over the five severities of each corruption of ImageNet-C
# (Hendrycks & Dietterich 2019, arXiv:1903.12261; to more digits than its table,
# in github.com/hendrycks/robustness).
ALEXNET_ERRORS = {
  'gaussian_noise': 0.886428,
  'shot_noise': 0.894468,
  'impulse_noise': 0.922640,
  'defocus_blur': 0.819880,
  'glass_blur': 0.826268,
  'motion_blur': 0.785948,
  'zoom_blur': 0.798360,
  'snow': 0.866816,
  'frost': 0.826572,
  'fog': 0.819324,
  'brightness': 0.564592,
  'contrast': 0.853204,
  'elastic_transform': 0.646056,
  'pixelate': 0.717840,
  'jpeg_compression': 0.606500,
}
SEVERITIES = range(1, 6)
CORRUPTED = 'imagenet2012_corrupted'
REAL = 'imagenet2012_real'

# {name of --set: data sets that are evaluated}.
SETS = {
  'v2': ('imagenet_v2',),
  'a': ('imagenet_a',),
  'r': ('imagenet_r',),
  'sketch': ('imagenet_sketch',),
  'real': (REAL,),
  'c': tuple(
    f'{CORRUPTED}/{corruption}_{severity}'
    for corruption in ALEXNET_ERRORS
    for severity in SEVERITIES
  ),
}

# The 200 classes of ImageNet-A (arXiv:1907.07174) and of ImageNet-R
# (arXiv:2006.16241). Logits of the others are not compared, as in the papers.
_CLASSES_A = (
  6, 11, 13, 15, 17, 22, 23, 27, 30, 37, 39, 42, 47, 50, 57, 70, 71, 76, 79,
  89, 90, 94, 96, 97, 99, 105, 107, 108, 110, 113, 124, 125, 130, 132, 143,
  144, 150, 151, 207, 234, 235, 254, 277, 283, 287, 291, 295, 298, 301, 306,
  307, 308, 309, 310, 311, 313, 314, 315, 317, 319, 323, 324, 326, 327, 330,
  334, 335, 336, 347, 361, 363, 372, 378, 386, 397, 400, 401, 402, 404, 407,
  411, 416, 417, 420, 425, 428, 430, 437, 438, 445, 456, 457, 461, 462, 470,
  472, 483, 486, 488, 492, 496, 514, 516, 528, 530, 539, 542, 543, 549, 552,
  557, 561, 562, 569, 572, 573, 575, 579, 589, 606, 607, 609, 614, 626, 627,
  640, 641, 642, 643, 658, 668, 677, 682, 684, 687, 701, 704, 719, 736, 746,
  749, 752, 758, 763, 765, 768, 773, 774, 776, 779, 780, 786, 792, 797, 802,
  803, 804, 813, 815, 820, 823, 831, 833, 835, 839, 845, 847, 850, 859, 862,
  870, 879, 880, 888, 890, 897, 900, 907, 913, 924, 932, 933, 934, 937, 943,
  945, 947, 951, 954, 956, 957, 959, 971, 972, 980, 981, 984, 986, 987, 988,
)  # fmt: skip
_CLASSES_R = (
  1, 2, 4, 6, 8, 9, 11, 13, 22, 23, 26, 29, 31, 39, 47, 63, 71, 76, 79, 84,
  90, 94, 96, 97, 99, 100, 105, 107, 113, 122, 125, 130, 132, 144, 145, 147,
  148, 150, 151, 155, 160, 161, 162, 163, 171, 172, 178, 187, 195, 199, 203,
  207, 208, 219, 231, 232, 234, 235, 242, 245, 247, 250, 251, 254, 259, 260,
  263, 265, 267, 269, 276, 277, 281, 288, 289, 291, 292, 293, 296, 299, 301,
  308, 309, 310, 311, 314, 315, 319, 323, 327, 330, 334, 335, 337, 338, 340,
  341, 344, 347, 353, 355, 361, 362, 365, 366, 367, 368, 372, 388, 390, 393,
  397, 401, 407, 413, 414, 425, 428, 430, 435, 437, 441, 447, 448, 457, 462,
  463, 469, 470, 471, 472, 476, 483, 487, 515, 546, 555, 558, 570, 579, 583,
  587, 593, 594, 596, 609, 613, 617, 621, 629, 637, 657, 658, 701, 717, 724,
  763, 768, 774, 776, 779, 780, 787, 805, 812, 815, 820, 824, 833, 847, 852,
  866, 875, 883, 889, 895, 907, 928, 931, 932, 933, 934, 936, 937, 943, 945,
  947, 948, 949, 951, 953, 954, 957, 963, 965, 967, 980, 981, 983, 988,
)  # fmt: skip


def specs(imagenet: DatasetSpec) -> Iterator[DatasetSpec]:
  """The test sets, as variants of `imagenet`; they have no training split."""

  def variant(name, split, count, tfds_name='', manual=False, label='label',
              classes=()):  # fmt: skip
    tfds_name = tfds_name or name
    command = (
      f'python scripts/prepare_tfds.py --name={tfds_name} '
      '--data_dir={data_dir}'
    )
    if manual:
      command += ' --manual_dir=DIRECTORY_OF_THE_TAR_FILES'
    store = dataclasses.replace(
      imagenet.store,
      tfds_name=tfds_name,
      command=command,
      resumes=False,
      label=label,
    )
    return dataclasses.replace(
      imagenet,
      name=name,
      splits={split: count},
      train_split='',
      eval_split=split,
      store=store,
      classes=classes,
    )

  yield variant('imagenet_v2', 'test', 10_000, 'imagenet_v2/matched-frequency')
  yield variant('imagenet_a', 'test', 7_500, classes=_CLASSES_A)
  yield variant('imagenet_r', 'test', 30_000, classes=_CLASSES_R)
  yield variant('imagenet_sketch', 'test', 50_889)
  yield variant(REAL, 'validation', 50_000, manual=True, label='original_label')
  for name in SETS['c']:
    yield variant(name, 'validation', 50_000, manual=True)


def label_sets(source: ShardedRecords, num_classes: int) -> np.ndarray:
  """Which classes are right for each example of `imagenet2012_real`.

  Those are its ReaL labels (arXiv:2006.07159); an example may have several, or
  none.

  Returns:
    bool [N, num_classes].
  """
  import tensorflow as tf

  right = np.zeros((source.num_examples, num_classes), bool)
  for start in range(0, source.num_examples, 256):
    stop = min(start + 256, source.num_examples)
    for place, record in enumerate(source.fetch(np.arange(start, stop)), start):
      features = tf.train.Example.FromString(record).features.feature
      right[place, features['real_label'].int64_list.value] = True
  return right


def corruption_errors(top1: Mapping[str, float]) -> dict[str, float]:
  """Computes the corruption error of each corruption, in percent.

    CE_c = 100 * sum_s E_{s,c} / sum_s E^AlexNet_{s,c}

  over the severities s, with errors E = 1 - top-1 / 100 (arXiv:1903.12261,
  section 4.1). Their mean is the mCE.

  Args:
    top1: in percent, of each data set in `SETS['c']`.
  """
  found = {}
  for corruption, alexnet in ALEXNET_ERRORS.items():
    errors = [
      1 - top1[f'{CORRUPTED}/{corruption}_{severity}'] / 100
      for severity in SEVERITIES
    ]
    found[corruption] = 100 * float(np.mean(errors)) / alexnet
  return found
