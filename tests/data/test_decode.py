"""Crops equal Pillow's, whatever the file; a broken one fails and says why."""

import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import odd_images
import pytest
import scipy.stats
import tensorflow as tf
from PIL import Image

from conadv_jax.data.images import decode

SAMPLINGS = ((1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (4, 2), (2, 4))
SIZE_PX = 32


def seed_of(number):
  return tf.constant([7, number], tf.int64)


@pytest.fixture(scope='module')
def window_of():
  """(height, width, seed number) -> the window, from a compiled graph."""
  graph = tf.function(decode._random_window)
  return lambda height, width, number: graph(
    tf.constant([height, width]), seed_of(number)
  ).numpy()


@pytest.fixture(scope='module')
def crop_of():
  """(data, windows) -> their pixels, from a graph of TensorFlow."""

  @tf.function(
    input_signature=[
      tf.TensorSpec([], tf.string),
      tf.TensorSpec([None, 4], tf.int32),
    ]
  )
  def one(data, windows):
    data, shape = decode._inspect(data)
    return decode._crop(data, shape, [windows[0]])[0]

  return lambda data, window: one(data, np.array([window], np.int32)).numpy()


@pytest.mark.parametrize('sampling', SAMPLINGS, ids=str)
@pytest.mark.parametrize('progressive', [False, True])
def test_fused_crop_is_decode_then_crop(sampling, progressive, crop_of):
  rng = np.random.default_rng(0)
  for height, width in ((75, 100), (63, 83), (9, 17), (1, 1)):
    photo = odd_images.photo(height, width)
    if sampling in ((1, 1), (2, 1), (2, 2)):
      index = {(1, 1): 0, (2, 1): 1, (2, 2): 2}[sampling]
      data = odd_images.encode(
        photo, quality=88, subsampling=index, progressive=progressive
      )
    else:
      data = odd_images.set_jpeg_sampling(
        odd_images.encode(photo, subsampling=0, progressive=progressive),
        *sampling,
      )
    whole = decode.decode(tf.constant(data)).numpy()
    np.testing.assert_array_equal(whole, odd_images.pil_pixels(data))
    for _ in range(30):
      top, left = rng.integers((height, width))
      h, w = rng.integers((1, 1), (height - top + 1, width - left + 1))
      np.testing.assert_array_equal(
        crop_of(data, (top, left, h, w)),
        whole[top : top + h, left : left + w],
      )


@pytest.mark.parametrize('name', odd_images.good())
def test_odd_file_decodes_as_in_pil(name):
  data = odd_images.good()[name]
  pixels = odd_images.pil_pixels(data)
  np.testing.assert_array_equal(decode.decode(tf.constant(data)), pixels)
  # Also when cropped from the file: as if it had been an array all along.
  for crop in (
    lambda image: decode.center_crop(image, SIZE_PX),
    lambda image: decode.random_resized_crops(image, [seed_of(0)], SIZE_PX),
  ):
    np.testing.assert_array_equal(
      crop(tf.constant(data)), crop(tf.constant(pixels))
    )


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_16_bit_png_gives_high_bytes(channels):
  pixels = odd_images.noise(9, 7, channels, np.uint16)
  expected = (pixels[..., :3] if channels > 2 else pixels[..., :1]) >> 8
  np.testing.assert_array_equal(
    decode.decode(tf.constant(odd_images.png16(pixels))),
    np.broadcast_to(expected, (9, 7, 3)),
  )


@pytest.fixture(scope='module')
def all_functions():
  """Dataset of files -> dataset of what each public function makes of it."""
  functions = {
    'decode': decode.decode,
    'center_crop': lambda data: decode.center_crop(data, SIZE_PX),
    # A window at the top: the fused op alone would not see a truncation.
    'crops': lambda data: decode.random_resized_crops(
      data, [seed_of(number) for number in (0, 1)], SIZE_PX
    ),
  }
  return lambda name, files: tf.data.Dataset.from_tensor_slices(files).map(
    functions[name]
  )


@pytest.mark.parametrize('function', ['decode', 'center_crop', 'crops'])
def test_bad_files_fail_with_the_reason(function, all_functions):
  files = odd_images.bad()
  data = [data for data, _ in files.values()]
  iterator = iter(all_functions(function, data))
  for name, (_, pattern) in files.items():
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
      next(iterator)
    assert pattern in error.value.message, (name, error.value.message)


@pytest.mark.parametrize('function', ['decode', 'center_crop', 'crops'])
def test_bad_files_are_dropped_by_ignore_errors(function, all_functions):
  image = odd_images.encode(odd_images.photo())
  bad = [data for data, _ in odd_images.bad().values()]
  mixed = [image, *bad[:9], image, *bad[9:], image]
  dataset = all_functions(function, mixed).ignore_errors()
  assert len(list(dataset)) == 3


@pytest.mark.parametrize(
  'name', ['JPEG', 'progressive JPEG', 'WebP', 'lossless WebP', 'RGBA WebP']
)
def test_every_cut_is_found_whatever_the_window(name, crop_of):
  jpeg = odd_images.encode(odd_images.photo())
  data = (odd_images.good() | {'JPEG': jpeg})[name]
  assert 'JPEG' not in name or data.count(b'\xff\xd9') == 1
  for length in (*range(0, len(data), 97), *range(len(data) - 20, len(data))):
    for top in (0, 40, 86):
      with pytest.raises(tf.errors.InvalidArgumentError):
        crop_of(data[:length], (top, 0, 8, 8))


SIZES = [(1, 1), (30, 61), (100, 90), (210, 33)]
LONG = [(3, 20_000), (65_535, 2)]


def half_noise(size):
  """uint8 [h, w, 3]: noise, whose overshoot is clipped, beside a photo."""
  pixels = np.array(odd_images.photo(*size))
  half = size[1] // 2
  pixels[:, :half] = odd_images.noise(*size, 3)[:, :half]
  return pixels


@pytest.mark.parametrize('interpolation', decode.INTERPOLATIONS)
@pytest.mark.parametrize('size', SIZES + LONG)
def test_antialiased_resize_is_that_of_pil(size, interpolation):
  pixels = half_noise(size)
  kind = getattr(Image, interpolation.upper())
  for size_px in (5, 32, 50):
    # In two steps, as versions of PIL differ in the axis they begin with.
    expected = (
      Image.fromarray(pixels)
      .resize((size_px, size[0]), kind)
      .resize((size_px, size_px), kind)
    )
    resized = decode.resize(tf.constant(pixels), size_px, interpolation)
    difference = np.abs(resized.numpy().astype(int) - np.asarray(expected))
    assert difference.max() <= 1 and difference.mean() < 0.02


@pytest.mark.parametrize('interpolation', decode.INTERPOLATIONS)
@pytest.mark.parametrize('size', SIZES)
def test_plain_resize_samples_the_kernel_at_unit_width(size, interpolation):
  def matrix(length, size_px):
    centers = (np.arange(size_px)[:, None] + 0.5) * length / size_px - 0.5
    if interpolation == 'bicubic':
      # TensorFlow has tabulated the cubic, in 1024 steps a pixel.
      centers = np.round(centers * 1024) / 1024
    d = np.abs(np.arange(length) - centers)
    weights = {
      'bilinear': np.maximum(1 - d, 0),
      'bicubic': np.where(
        d < 1,
        1.5 * d**3 - 2.5 * d**2 + 1,
        np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0),
      ),
    }[interpolation]
    return weights / weights.sum(1, keepdims=True)

  pixels = half_noise(size)
  for size_px in (5, 32, 50):
    expected = np.einsum(
      'yh,xw,hwc->yxc',
      matrix(size[0], size_px),
      matrix(size[1], size_px),
      pixels,
    )
    resized = decode.resize(tf.constant(pixels), size_px, interpolation, False)
    difference = np.abs(resized.numpy() - np.clip(expected, 0, 255))
    assert difference.max() <= 0.501


@pytest.mark.parametrize('size', [(94, 125), (125, 94), (64, 64), (7, 300)])
def test_center_crop_is_that_of_pil(size):
  height, width = size
  data = odd_images.encode(odd_images.photo(*size), quality=90)
  side = int(0.875 * min(size))
  top, left = (height - side + 1) // 2, (width - side + 1) // 2
  expected = (
    Image.open(io.BytesIO(data))
    .crop((left, top, left + side, top + side))
    .resize((SIZE_PX, SIZE_PX), Image.BICUBIC)
  )
  crop = decode.center_crop(tf.constant(data), SIZE_PX, 0.875)
  assert crop.shape == (SIZE_PX, SIZE_PX, 3)
  difference = np.abs(crop.numpy().astype(int) - np.asarray(expected))
  assert difference.max() <= 1


def test_two_crops_are_those_of_each_seed_alone():
  data = tf.constant(odd_images.encode(odd_images.photo(), quality=90))
  pixels = decode.decode(data)
  crops_of = tf.function(
    lambda image, seeds: decode.random_resized_crops(
      image, tf.unstack(seeds), SIZE_PX
    )
  )
  for number in range(15):
    seeds = tf.stack([seed_of(number), seed_of(number + 100)])
    crops = crops_of(data, seeds)
    assert crops.shape == (2, SIZE_PX, SIZE_PX, 3)
    for crop, seed in zip(crops, seeds, strict=True):
      np.testing.assert_array_equal(crop, crops_of(data, seed[None])[0])
    np.testing.assert_array_equal(crops, crops_of(pixels, seeds))


def test_shapes_are_static():
  files = tf.data.Dataset.from_tensors(b'')
  pixels = tf.data.Dataset.from_tensors(np.zeros((4, 5, 3), np.uint8))
  for dataset in (files, pixels):
    crops = dataset.map(
      lambda image: (
        decode.random_resized_crops(image, [seed_of(0), seed_of(1)], 8),
        decode.center_crop(image, 8),
      )
    )
    assert [spec.shape for spec in crops.element_spec] == [
      (2, 8, 8, 3),
      (8, 8, 3),
    ]
  spec = files.map(decode.decode).element_spec
  assert spec.shape.as_list() == [None, None, 3]


@pytest.mark.parametrize('size', [(375, 500), (500, 200)])
def test_windows_keep_to_their_bounds_and_spread_evenly(size, window_of):
  windows = np.array([window_of(*size, number) for number in range(1000)])
  top, left, height, width = windows.T
  ends = np.stack([top + height, left + width], 1)
  assert windows.min() >= 0 and (ends <= size).all()
  # Sides are rounded to whole pixels.
  area = height * width / np.prod(size)
  assert 0.078 < area.min() < 0.1 and area.max() <= 1
  aspect = width / height
  assert 0.745 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.342
  for place, side, image_side in ((top, height, 0), (left, width, 1)):
    room = size[image_side] - side
    roomy = room > 20
    even = scipy.stats.kstest(
      (place[roomy] + 0.5) / (room[roomy] + 1), 'uniform'
    )
    assert even.pvalue > 1e-3


def test_windows_depend_on_the_seed_alone(window_of):
  first = [window_of(375, 500, number) for number in range(20)]
  again = [window_of(375, 500, number) for number in range(20)]
  np.testing.assert_array_equal(first, again)
  assert len(np.unique(first, axis=0)) == 20


@pytest.mark.parametrize('size', [(1, 20_000), (20_000, 1), (1, 1)])
def test_window_is_the_whole_image_where_none_fits(size, window_of):
  windows = [window_of(*size, number) for number in range(10)]
  np.testing.assert_array_equal(windows, [[0, 0, *size]] * 10)


def test_window_is_the_whole_image_after_ten_misses(window_of):
  # Nine in ten attempts miss: so wide an image leaves little between 8 % of its
  # area and a height of all rows at 4:3. 0.9**10 is 0.35.
  windows = [window_of(100, 1600, number) for number in range(300)]
  whole = [tuple(window) == (0, 0, 100, 1600) for window in windows]
  assert 0.25 < np.mean(whole) < 0.5


def test_unknown_interpolation_is_refused():
  image = tf.zeros([4, 4, 3], tf.uint8)
  with pytest.raises(ValueError, match="interpolation='lanczos': choose from"):
    decode.resize(image, 4, 'lanczos')


def mutants(count):
  """Seeded damage to good files: flips, cuts, insertions, false headers."""
  rng = np.random.default_rng(0)
  photo = odd_images.photo(60, 80)
  jpegs = [
    odd_images.encode(photo, subsampling=0),
    odd_images.encode(photo, subsampling=2),
    odd_images.encode(photo, progressive=True),
    odd_images.encode(photo.convert('L')),
    odd_images.encode(photo.convert('CMYK')),
  ]
  pngs = [
    odd_images.encode(photo, 'PNG'),
    odd_images.encode(photo.quantize(40), 'PNG'),
    odd_images.png16(odd_images.noise(60, 80, 4, np.uint16)),
  ]
  webps = [
    odd_images.good()[name]
    for name in ('WebP', 'RGBA WebP', 'lossless WebP', 'animated WebP')
  ]
  for number in range(count):
    seeds = (jpegs, pngs, webps)[number % 3]
    data = bytearray(seeds[rng.integers(len(seeds))])
    kind = number // 3 % 5
    if kind == 0:
      for at in rng.integers(len(data), size=rng.integers(1, 9)):
        data[at] ^= 1 << rng.integers(8)
    elif kind == 1:
      del data[rng.integers(len(data)) :]
    elif kind == 2:
      at = rng.integers(len(data))
      data[at:at] = rng.bytes(rng.integers(1, 20))
    elif kind == 3:
      at = rng.integers(min(len(data), 700))
      data[at : at + 2] = rng.bytes(2)
    elif data[:1] == b'\x89':
      data = odd_images.set_png_size(bytes(data), *rng.integers(1, 9000, 2))
    elif b'\xff\xc0' in data:
      data = odd_images.set_jpeg_size(bytes(data), *rng.integers(1, 9000, 2))
    yield bytes(data)


def fuzz(count, megabytes):
  """Crops each mutant twice, in `megabytes` beyond what TensorFlow takes."""
  import resource

  @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
  def crops(data):
    pair = decode.random_resized_crops(data, [seed_of(0), seed_of(1)], SIZE_PX)
    return tf.concat([pair, decode.center_crop(data, SIZE_PX)[None]], 0)

  crops(tf.constant(odd_images.encode(odd_images.photo())))
  status = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  taken = int(status.split('VmSize:')[1].split()[0]) * 1024
  limit = taken + megabytes * 2**20
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

  def outcome(data):
    try:
      pixels = crops(tf.constant(data)).numpy()
    except tf.errors.InvalidArgumentError:
      return None
    assert pixels.shape == (3, SIZE_PX, SIZE_PX, 3)
    return pixels.tobytes()

  first, again = (list(map(outcome, mutants(count))) for _ in range(2))
  assert first == again
  print(count - first.count(None), first.count(None))


@pytest.mark.slow
def test_mutated_files_give_an_image_or_an_error_in_bounded_memory():
  # An image of MAX_PIXELS, a copy, and a progressive JPEG's coefficients, two
  # bytes for each sample, are 770 MB. The rest is for the code that oneDNN
  # makes for each shape: without room for it, it ends the process.
  done = subprocess.run(
    [sys.executable, '-c', 'import test_decode; test_decode.fuzz(500, 1200)'],
    cwd=pathlib.Path(__file__).parent,
    env={
      **os.environ,
      'MALLOC_ARENA_MAX': '2',
      'PYTHONPATH': str(pathlib.Path(__file__).parents[1]),
    },
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  images, errors = map(int, done.stdout.split())
  assert images + errors == 500 and min(images, errors) > 50
