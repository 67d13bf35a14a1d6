"""Every field of a run, with unit and meaning; recipes override a few.

A field that is None is filled from its preset when the file is read
(`staleness_steps` from `method`, the fields of `attack` from `attack.preset`,
`optimizer.eps` from `optimizer.name`, `grad_buckets` from `xla_flags`).
"""

import ml_collections
from ml_collections import config_dict

from conadv_jax.base.errors import ConfigError
from conadv_jax.config import parse_args

parse_args = parse_args


def get_config() -> ml_collections.ConfigDict:
  c = ml_collections.ConfigDict()

  c.seed = 0  # keys order, augmentation, initial weights and attack noise
  c.method = 'conadv'  # baseline, autoaugment, disadv, conadv, conadv_aa
  c.model = 'resnet8'  # a name in conadv_jax.models.MODELS

  # Options of the network; one that a model lacks is refused.
  c.network = ml_collections.ConfigDict()
  # ResNet: the 7x7 stem as 4x4 on blocks of 2x2 pixels, which suits the matrix
  # units of a TPU; same function, same weights.
  c.network.space_to_depth = False
  # Stochastic depth: share of examples that skip the last block, fewer skip
  # those before. None = the model's.
  c.network.drop_path_rate = config_dict.placeholder(float)
  # Share of features dropped before the last layer. None = the model's.
  c.network.dropout_rate = config_dict.placeholder(float)

  c.dataset = ml_collections.ConfigDict()
  c.dataset.name = 'digits'  # a name in conadv_jax.data.datasets.DATASETS
  c.dataset.data_dir = ''  # TFDS directory; '' = $TFDS_DATA_DIR or TFDS's own
  # What is trained on in TFDS's notation: train[:10000], train[80%:],
  # train+test; '' = the data set's own split.
  c.dataset.train_split = ''
  c.dataset.eval_split = ''  # what is evaluated, likewise

  # Of data sets stored as JPEG or PNG files of any size: the crop for training
  # (area 0.08 to 1, aspect 3/4 to 4/3) or the central one is resized to this.
  c.dataset.image_size_px = 0  # height and width; 0 = data set of a fixed size
  c.dataset.interpolation = 'bicubic'  # bicubic, bilinear
  c.dataset.antialias = True  # low-pass where an image is made smaller
  c.dataset.eval_crop_ratio = 0.875  # side of the central crop, of the image's

  # Fixed size: blocks of so many pixels a side are averaged on loading, rounded
  # half up; 1 = off.
  c.dataset.pool = 1
  c.dataset.crop_padding_px = 0  # fixed size: zero padding, then a random crop
  c.dataset.random_flip = False  # left-right, where the data set allows it
  c.dataset.autoaugment = 'v0'  # of the view aa: v0, reduced_imagenet,
  #   randaugment
  c.dataset.randaugment_layers = 2  # N, operations per image
  c.dataset.randaugment_magnitude = 9.0  # M, level of each, 10 = full strength
  c.dataset.aa_shares_crop = False  # aa starts from the crop and flip of clean

  c.dataset.cache = 'none'  # none; raw: files in RAM; decoded: pixels in RAM
  c.dataset.shuffle_window_shards = 8  # TFRecord: shards shuffled together
  c.dataset.max_bad_share = 0.001  # of unreadable examples; more stop the run

  c.batch_size = 320  # examples per optimizer step, over all devices
  c.epochs = 60.0  # length of the schedule, in passes over the training split
  c.max_steps = 0  # stop after so many steps, schedule unchanged; 0 = off

  # tau: the attack on batch t uses the weights of step t - tau.
  c.staleness_steps = config_dict.placeholder(int)  # None = the method's

  c.bn_group_size = 64  # examples that share batch-norm statistics
  c.bn_momentum = 0.9  # share of the old running statistic kept per step
  c.bn_epsilon = 1e-5  # added to the variance
  c.dtype = 'float32'  # of activations; parameters and loss stay float32
  #   bfloat16 halves the activations; float64 is for tests (JAX_ENABLE_X64=1)
  c.microbatches = 1  # parts of a batch that are computed one after the other:
  #   same result, less memory for activations
  c.remat = 'none'  # or blocks: keep only the inputs of a network's blocks and
  #   compute the rest again for the gradients: a fifth more work, less memory
  #   (not on CPUs, whose compiler makes no use of it)

  # Of several devices:
  c.shard_optimizer = False  # its state split over devices, not copied to each
  c.grad_allreduce_dtype = 'float32'  # or bfloat16: half the bytes, less exact
  # Vectors that gradients are summed in; 0 = as the compiler sees fit. None =
  # 1 if xla_flags is set: v5e, and networks between slices, can put nothing
  # else behind other work.
  c.grad_buckets = config_dict.placeholder(int)
  c.xla_flags = 'none'  # of TPU compilers: none, overlap (sums of gradients
  #   behind other work), multislice (for several slices: those between them)

  c.loss = ml_collections.ConfigDict()
  c.loss.label_smoothing = 0.1  # share spread evenly over all classes
  c.loss.view_weights = ml_collections.ConfigDict(
    {'clean': 1.0, 'aa': 1.0, 'adv': 1.0}  # relative; 1:1:1 as in the paper
  )

  c.attack = ml_collections.ConfigDict()
  c.attack.preset = 'fgsm'  # fgsm, paper, pgd; fills the fields left None
  c.attack.norm = config_dict.placeholder(str)  # linf or l2
  c.attack.epsilon = config_dict.placeholder(float)  # radius, grey levels
  # Per step, grey levels; None = epsilon for one step, epsilon / 4 for more.
  c.attack.step_size = config_dict.placeholder(float)
  c.attack.steps = config_dict.placeholder(int)  # gradient steps k
  c.attack.targeted = config_dict.placeholder(bool)  # towards a random class
  c.attack.random_start_prob = config_dict.placeholder(float)  # 0 = clean start
  c.attack.train_mode = config_dict.placeholder(bool)  # batch statistics
  c.attack.update_batch_stats = config_dict.placeholder(bool)  # let it move BN

  c.optimizer = ml_collections.ConfigDict()
  c.optimizer.name = 'lars'  # lars, sgd, lamb, rmsprop
  c.optimizer.learning_rate = 4.0  # peak, at base_batch_size
  c.optimizer.base_batch_size = 256  # examples
  c.optimizer.scaling = 'none'  # none, linear, sqrt: of the peak with the batch
  c.optimizer.momentum = 0.9  # lars, sgd, rmsprop
  c.optimizer.nesterov = False  # lars, sgd, rmsprop
  c.optimizer.weight_decay = 1e-4  # convolution and dense kernels only
  c.optimizer.lars_denominator = 'norm_of_sum'  # |g + wd w| (optax), or
  #   sum_of_norms: |g| + wd |w| (the paper's code, MLPerf)
  c.optimizer.trust_coefficient = 0.001  # lars: eta
  c.optimizer.beta1 = 0.9  # lamb: decay of the first moment
  c.optimizer.beta2 = 0.999  # lamb: decay of the second moment
  c.optimizer.decay = 0.9  # rmsprop: decay of the mean square
  c.optimizer.eps = config_dict.placeholder(float)  # None = the optimizer's

  c.schedule = ml_collections.ConfigDict()
  c.schedule.name = 'polynomial'  # polynomial, cosine, exponential
  c.schedule.warmup_epochs = 5.0  # linear from 0 to the peak
  c.schedule.power = 2.0  # polynomial: of the remaining share
  c.schedule.end_learning_rate = 0.0  # polynomial, cosine: the last value
  c.schedule.decay_rate = 0.97  # exponential: factor of each decay
  c.schedule.decay_epochs = 2.4  # exponential: epochs between decays

  c.ema = ml_collections.ConfigDict()
  c.ema.decay = 0.0  # of the average of parameters, per step; 0 = off
  c.ema.batch_stats = True  # average the batch-norm statistics too

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every_steps = 500  # 0 = only at the end and when interrupted
  c.checkpoint.keep = 3  # newest checkpoints kept
  c.checkpoint.strict = False  # a damaged checkpoint is an error; False: take
  #   the one before it

  c.eval = ml_collections.ConfigDict()
  c.eval.batch_size = 512  # examples, over all devices
  c.eval.every_steps = 0  # clean accuracy while training; 0 = only at the end
  c.eval.attack = 'fgsm'  # none, fgsm, pgd, all: of robust_top1 at the end
  c.eval.epsilon = 4.0  # L-infinity radius, grey levels
  c.eval.pgd_steps = 10  # step size 2.5 * epsilon / steps
  c.eval.route = 'clean'  # batch-norm row: clean, aa, adv
  c.eval.use_ema = False  # evaluate the averaged weights

  c.log_every_steps = 50  # metrics.jsonl, TensorBoard and the progress line
  c.attack_stats_every_steps = 100  # stale against fresh perturbation; 0 = off
  c.max_nonfinite_steps = 5  # stop after so many non-finite steps in a row

  # Steps whose loss is so many standard deviations above the mean of the last
  # ones are not applied, but recorded.
  c.spike = ml_collections.ConfigDict()
  c.spike.sigmas = 0.0  # e.g. 6; 0 = off
  c.spike.window_steps = 128  # applied steps that mean and deviation are over
  c.spike.max_in_a_row = 5  # the next one is applied: the loss has moved

  # A step, its input or a save that takes longer ends the run (exit code 6);
  # 0 = never. Compiling and reading a data set into memory may take longer.
  c.hang_timeout_seconds = 1800
  return c


def set_imagenet(c: ml_collections.ConfigDict, image_size_px: int) -> None:
  """ImageNet, resized without antialiasing as in the paper's code."""
  c.dataset.name = 'imagenet2012'
  c.dataset.image_size_px = image_size_px
  c.dataset.random_flip = True
  c.dataset.antialias = False
  c.eval.batch_size = 1024
  c.eval.every_steps = max(1, round(4 * 1_281_167 / c.batch_size))
  c.checkpoint.every_steps = max(1, round(1_281_167 / c.batch_size))
  c.log_every_steps = min(50, c.checkpoint.every_steps)


def batch_size_of(text: str, named: dict[str, int]) -> int:
  """'96k' -> 98304, by name, or a plain number."""
  if text in named:
    return named[text]
  if not text.isdecimal() or not int(text):
    raise ConfigError(
      f'batch_size={text!r}: must be a number or one of {", ".join(named)}'
    )
  return int(text)
