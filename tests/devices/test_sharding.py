"""One, two and eight devices: the same numbers, and what they tell each other.

The collectives of a step whose batch-norm groups fit in a device: one
all-reduce, which carries

  the gradient of every parameter     the only sum that training needs
  the statistics of every batch norm  mean over all groups, for evaluation
  loss and accuracy of each view      to be logged

and nothing for the attack. Where a group spans devices, batch norm talks within
the group, in the update and in the attack: the statistics of each layer forward
and their gradient backward. XLA merges what is ready together, hence the exact
numbers below; what may not change is that nothing but sums is exchanged.
"""

import collections
import dataclasses
import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import experiment, models
from conadv_jax.base.errors import ConfigError
from conadv_jax.data import datasets
from conadv_jax.devices import sharded_optimizer
from conadv_jax.method.staleness import (
  make_attack_stats_fn,
  pending_perturbation,
)
from conadv_jax.method.state import Perturbation, copied

BATCH = 16
STEPS = 3
TOLERANCE = 1e-12
SLOW = pytest.mark.slow


@pytest.fixture
def tiny_model(monkeypatch):
  monkeypatch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 4))


@pytest.fixture
def tiny_colour(monkeypatch):
  spec = dataclasses.replace(
    datasets.get_spec('digits'),
    name='tiny_colour',
    image_shape=(4, 4, 3),
    mean=(100.0, 140.0, 120.0),
    std=(60.0, 80.0, 70.0),
  )
  monkeypatch.setitem(datasets.DATASETS, 'tiny_colour', spec)


def build(devices, group_size, **fields):
  """The experiment that the tests of this file run or compile."""
  config = helpers.make_config(
    {
      'model': 'tiny',
      'batch_size': BATCH,
      'bn_group_size': group_size,
      # Starts are random: they must not depend on the devices either.
      'attack.preset': 'paper',
      'attack.random_start_prob': 0.5,
    }
    | fields
  )
  return experiment.build(config, devices=jax.devices()[:devices])


def random_batches(run, count):
  """Batches of noise on the devices of `run`."""
  return [
    run.put_batch({k: x.reshape(-1, *x.shape[2:]) for k, x in batch.items()})
    for batch in helpers.random_batches(run.config, count, spec=run.spec)
  ]


@functools.cache
def trajectory(devices, group_size, **fields):
  """A few steps in float64: [(state, metrics)] on the host, and whether the
  first step took over every buffer of the state it was given."""
  always = {'dtype': 'float64', 'staleness_steps': 2, 'ema.decay': 0.9}
  run = build(devices, group_size, **always | fields)
  step = run.compile_step()
  batches = random_batches(run, STEPS + 1)
  first = pending_perturbation(run.config, step, run.init_state(), batches[0])
  # A copy, as an array that is looked at from the host cannot be donated.
  state, history = first, [jax.device_get((copied(first), {}))]
  for batch, following in zip(batches, batches[1:], strict=False):
    state, metrics = step(state, batch, following)
    history.append(jax.device_get((state, metrics)))
  donated = all(x.is_deleted() for x in jax.tree.leaves(first))
  return history, donated


# (8, 2): groups within a device, mesh 8x1; two devices are below.
# (8, 8): two groups over four devices each, mesh 2x4.
@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize(
  ('devices', 'group_size'), (pytest.param(8, 2, marks=SLOW), (8, 8))
)
def test_a_run_does_not_depend_on_the_devices(devices, group_size):
  expected, _ = trajectory(1, group_size)
  actual, _ = trajectory(devices, group_size)
  assert_same_run(actual, expected)
  first, last = (jax.tree.leaves(expected[t][0].params) for t in (0, -1))
  for a, b in zip(first, last, strict=True):
    assert np.abs(a - b).max() > 1e-4


@SLOW
@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize(
  ('devices', 'microbatches'),
  ((8, 1), (1, 4), (2, 2)),
)
def test_a_share_of_the_batch_does_not_depend_on_the_devices(
  devices, microbatches
):
  fields = {
    'method': 'fast_advprop', 'staleness_steps': 0, 'attack.preset': None,
    'batch_size': 80,
  }  # fmt: skip
  expected, _ = trajectory(1, 2, **fields)
  actual, _ = trajectory(devices, 2, microbatches=microbatches, **fields)
  assert_same_run(actual, expected)


# Of weights that are perturbed: over the whole batch, and groups of 4 examples,
# which are as many parts.
@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize(
  ('devices', 'microbatches', 'fields'),
  [
    (2, 2, {'method': 'consam', 'sam.normalize': 'layerwise'}),
    *(
      pytest.param(*case, marks=SLOW)
      for case in (
        (8, 1, {'method': 'consam', 'sam.mask': 'norm_only'}),
        (8, 1, {'method': 'conadv_consam', 'grad_buckets': 1}),
        (2, 2, {'method': 'sam', 'staleness_steps': 0}),
        (2, 2, {'method': 'sampa', 'staleness_steps': 1}),
        (2, 2, {'method': 'random', 'staleness_steps': 0}),
        (2, 2, {'method': 'consam', 'sam.group_size': 4}),
        (4, 1, {'method': 'sam', 'staleness_steps': 0, 'sam.group_size': 4}),
      )
    ),
  ],
  ids=lambda x: str(x).replace(' ', ''),
)
def test_perturbed_weights_do_not_depend_on_the_devices(
  devices, microbatches, fields
):
  parts = devices * microbatches if 'sam.group_size' in fields else 1
  expected, _ = trajectory(1, 2, microbatches=parts, **fields)
  actual, donated = trajectory(devices, 2, microbatches=microbatches, **fields)
  assert_same_run(actual, expected)
  assert donated


@SLOW
@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize('fields', [{}, {'sam.group_size': 8}], ids=str)
def test_perturbed_weights_of_groups_that_span_devices(fields):
  fields = fields | {'method': 'consam'}
  expected, _ = trajectory(1, 8, microbatches=2, **fields)
  actual, _ = trajectory(8, 8, **fields)
  for (state, _), (e_state, _) in zip(actual, expected, strict=True):
    # The gradients of groups are kept by each of their devices.
    pair = (x.replace(perturbation=None) for x in (state, e_state))
    helpers.assert_close(*pair, TOLERANCE)


@SLOW
@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize('method', ['consam', 'sampa', 'msam'])
def test_a_sharded_optimizer_perturbs_the_same_weights(monkeypatch, method):
  monkeypatch.setattr(sharded_optimizer, 'SHARD_MULTIPLE', 16)
  fields = {'method': method, 'staleness_steps': int(method != 'msam')}
  expected, _ = trajectory(1, 2, **fields)
  actual, _ = trajectory(8, 2, shard_optimizer=True, **fields)
  for (state, values), (e_state, e_values) in zip(
    actual, expected, strict=True
  ):
    helpers.assert_close(values, e_values, TOLERANCE)
    helpers.assert_close(state.params, e_state.params, TOLERANCE)


@SLOW
@pytest.mark.usefixtures('tiny_model', 'x64')
def test_random_signs_do_not_depend_on_the_devices():
  fields = {'attack.preset': 'random_signs', 'staleness_steps': 1}
  expected, _ = trajectory(1, 2, **fields)
  actual, _ = trajectory(8, 2, **fields)
  assert_same_run(actual, expected)


def assert_same_run(actual, expected):
  for (state, metrics), (e_state, e_metrics) in zip(
    actual, expected, strict=True
  ):
    helpers.assert_close(state, e_state, TOLERANCE)
    helpers.assert_close(metrics, e_metrics, TOLERANCE)


# 1 device: 8 groups of 2 in turn. (2, 2): two groups of a device at a time.
# (8, 4): four groups, two at a time, each over four devices.
@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize(
  ('devices', 'group_size', 'microbatches'),
  (
    (2, 2, 2),
    *(pytest.param(*case, marks=SLOW) for case in ((1, 2, 8), (8, 4, 2))),
  ),
)
def test_microbatches_do_not_change_a_run(devices, group_size, microbatches):
  expected, _ = trajectory(1, group_size)
  actual, donated = trajectory(devices, group_size, microbatches=microbatches)
  assert_same_run(actual, expected)
  assert donated


@pytest.mark.usefixtures('tiny_model', 'tiny_colour', 'x64')
@pytest.mark.parametrize(
  'fields',
  (
    pytest.param({'staleness_steps': 0, 'method': 'disadv'}, marks=SLOW),
    pytest.param(
      {'staleness_steps': 1, 'attack.update_batch_stats': True}, marks=SLOW
    ),
    pytest.param({'staleness_steps': 1, 'attack.preset': 'pgd'}, marks=SLOW),
    pytest.param({'method': 'conadv_aa', 'staleness_steps': 1}, marks=SLOW),
    pytest.param({'method': 'baseline', 'staleness_steps': 0}, marks=SLOW),
  ),
  ids=lambda fields: '-'.join(map(str, fields.values())),
)
def test_microbatches_do_not_change_any_method(fields):
  fields = fields | {'dataset.name': 'tiny_colour'}
  expected, _ = trajectory(1, 2, **fields)
  actual, _ = trajectory(2, 2, microbatches=4, **fields)
  assert_same_run(actual, expected)


@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize(
  'buckets', (3, pytest.param(1, marks=SLOW), pytest.param(1000, marks=SLOW))
)
def test_buckets_of_gradients_do_not_change_a_run(buckets):
  expected, _ = trajectory(8, 2)
  actual, _ = trajectory(8, 2, grad_buckets=buckets)
  assert_same_run(actual, expected)


@pytest.mark.slow
@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize(
  ('devices', 'microbatches'),
  ((2, 4), *(pytest.param(*p, marks=SLOW) for p in ((1, 4), (2, 1), (8, 1)))),
)
def test_how_a_perturbation_aged_does_not_depend_on_how_it_is_computed(
  devices, microbatches
):
  def stats(devices, microbatches):
    run = build(
      devices, 2, dtype='float64', microbatches=microbatches, staleness_steps=1
    )
    batch, _ = random_batches(run, 2)
    noise = np.random.default_rng(0).normal(0, 3, batch['clean'].shape)
    delta = jax.device_put(noise, batch['clean'].sharding)
    state = run.init_state().replace(perturbation=Perturbation(delta))
    fn = make_attack_stats_fn(run.setup)
    return jax.device_get(jax.jit(fn)(state, batch))

  expected, actual = stats(1, 1), stats(devices, microbatches)
  helpers.assert_close(actual, expected, TOLERANCE)
  assert 0 < expected['delta_agreement'] < 100


@pytest.mark.usefixtures('tiny_model', 'x64')
def test_microbatches_that_are_not_finite_are_not_applied():
  """One bad microbatch of one device stops the update of the whole batch."""
  run = build(2, 2, microbatches=4, dtype='float64', staleness_steps=1)
  step = run.compile_step()
  batches = random_batches(run, 2)
  state = pending_perturbation(run.config, step, run.init_state(), batches[0])
  bad = state.perturbation.images.at[5, 1, 0, 0, 0].set(jnp.nan)
  before = jax.device_get(copied(state))
  after, metrics = step(state.replace(perturbation=Perturbation(bad)), *batches)
  assert metrics['nonfinite_streak'] == 1
  assert helpers.bits(after.params) == helpers.bits(before.params)
  assert helpers.bits(after.opt_state) == helpers.bits(before.opt_state)


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
@pytest.mark.parametrize('shard_optimizer', (False, True))
@pytest.mark.slow
def test_gradients_are_summed_in_the_type_that_the_configuration_says(
  dtype, shard_optimizer
):
  """Activations are bfloat16, of which a partitioner would make both alike."""
  run = build(
    8,
    2,
    model='resnet8',
    dtype='bfloat16',
    grad_allreduce_dtype=dtype,
    shard_optimizer=shard_optimizer,
  )
  text = run.lower_step().as_text()
  summed = re.findall(
    r'"stablehlo\.(?:all_reduce|reduce_scatter)".*?\}\) : \((tensor<[^>]*>)',
    text,
    re.DOTALL,
  )
  types = collections.Counter(
    t.removeprefix('tensor<').rpartition('x')[2][:-1] for t in summed
  )
  state = run.abstract_state()
  sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
  gradients = len(sizes)
  if shard_optimizer:  # all large ones at once, over either axis of the mesh
    gradients = sum(n < sharded_optimizer.SHARD_MULTIPLE for n in sizes) + 2
  others = len(jax.tree.leaves(state.batch_stats)) + 2  # loss, accuracy
  expected = collections.Counter({'f32': others})
  expected[{'float32': 'f32', 'bfloat16': 'bf16'}[dtype]] += gradients
  assert types == expected


# ---- The sharded optimizer -------------------------------------------------


@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize(
  ('name', 'group_size'),
  (
    ('lars', 8),
    *(
      pytest.param(name, 2, marks=SLOW)
      for name in ('lars', 'sgd', 'lamb', 'rmsprop')
    ),
  ),
)
def test_a_sharded_optimizer_does_not_change_a_run(
  monkeypatch, name, group_size
):
  # The kernels of the tiny network are large then, and need padding.
  monkeypatch.setattr(sharded_optimizer, 'SHARD_MULTIPLE', 16)
  fields = {'optimizer.name': name, 'optimizer.learning_rate': 0.01}
  fields = {} if name == 'lars' else fields  # that of the other tests
  expected, _ = trajectory(1, group_size, **fields)
  actual, donated = trajectory(8, group_size, shard_optimizer=True, **fields)
  assert donated
  like = expected[0][0].params
  for (state, metrics), (e_state, e_metrics) in zip(
    actual, expected, strict=True
  ):
    helpers.assert_close(metrics, e_metrics, TOLERANCE)
    helpers.assert_close(
      state.replace(opt_state=()), e_state.replace(opt_state=()), TOLERANCE
    )
    sizes = {leaf.size for leaf in jax.tree.leaves(like)}
    assert any(size % 16 for size in sizes if size >= 16)
    for leaf, e_leaf in zip(
      jax.tree.leaves(state.opt_state),
      jax.tree.leaves(e_state.opt_state),
      strict=True,
    ):
      flat = leaf.reshape(-1)
      helpers.assert_close(flat[: e_leaf.size], e_leaf.reshape(-1), TOLERANCE)


@pytest.mark.slow
@pytest.mark.usefixtures('tiny_model')
def test_a_sharded_optimizer_takes_a_share_of_the_memory(monkeypatch):
  monkeypatch.setattr(sharded_optimizer, 'SHARD_MULTIPLE', 16)
  run = build(8, 2, shard_optimizer=True)
  state, _ = run.compile_step().output_shardings
  leaves = jax.tree.leaves(run.abstract_state().opt_state)
  large = [leaf for leaf in leaves if leaf.size >= 16]
  assert len(large) == 3  # momentum of two convolutions and the dense layer
  for leaf in large:
    assert leaf.sharding.shard_shape(leaf.shape) == (leaf.size // 8,)
  assert state == jax.tree.map(lambda s: s.sharding, run.abstract_state())


def test_an_optimizer_is_sharded_over_a_power_of_two():
  with pytest.raises(
    ConfigError, match='shard_optimizer=True: 6 shards .* False'
  ):
    build(6, 1, shard_optimizer=True, batch_size=24)


@pytest.mark.usefixtures('tiny_model', 'x64')
@pytest.mark.parametrize('devices', (1, 8))
def test_the_state_is_donated_from_the_first_step_on(devices):
  """No two of its leaves share a buffer: XLA refuses to donate one twice.

  The state is that of `init_state` with a warm perturbation.
  """
  history, donated = trajectory(devices, 2)
  assert donated
  assert [int(state.step) for state, _ in history] == [0, 1, 2, 3]
  assert history[-1][0].nonfinite_steps == 0


# ---- Collectives, in the types that users train with -----------------------


@functools.cache
def compiled(group_size):
  """(experiment, the program for eight devices)."""
  run = build(8, group_size)
  return run, run.compile_step()


def reduced_by_a_step(run):
  """Shapes of what the update needs summed over devices."""
  state = run.abstract_state()
  views = len(run.config.views)
  per_view = [(views,), (views,)]  # loss, accuracy
  leaves = jax.tree.leaves((state.params, state.batch_stats))
  return unordered([x.shape for x in leaves] + per_view)


def unordered(shapes):
  """XLA may transpose a gradient before it sums it."""
  return collections.Counter(tuple(sorted(shape)) for shape in shapes)


@pytest.mark.usefixtures('tiny_model')
def test_groups_within_a_device_need_one_all_reduce():
  run, step = compiled(2)
  found = helpers.collectives(step.as_text())
  assert [i.kind for i in found] == ['all-reduce']
  assert unordered(found[0].shapes) == reduced_by_a_step(run)


@pytest.mark.usefixtures('tiny_model')
def test_one_device_exchanges_nothing():
  step = build(1, 2).compile_step()
  assert not helpers.collectives(step.as_text())


@pytest.mark.usefixtures('tiny_model')
def test_one_bucket_is_one_vector():
  """Of everything that is summed, or a compiler joins it to what is not."""
  run = build(8, 2, grad_buckets=1)
  text = run.lower_step().as_text()
  (summed,) = re.findall(
    r'"stablehlo\.all_reduce".*?\}\) : \((tensor<[^>]*>)', text, re.DOTALL
  )
  state = run.abstract_state()
  leaves = jax.tree.leaves((state.params, state.batch_stats))
  per_view = 2 * len(run.config.views)  # loss, accuracy
  size = sum(leaf.size for leaf in leaves) + per_view
  assert summed == f'tensor<{size}xf32>'


@pytest.mark.usefixtures('tiny_model')
def test_groups_over_devices_exchange_statistics_and_nothing_else():
  run, step = compiled(8)
  found = helpers.collectives(step.as_text())
  # 2 layers x (update, attack) x (forward, backward) = 8 of batch norm, of
  # which XLA merges one pair; 1 of gradients, statistics and metrics.
  assert collections.Counter(i.kind for i in found) == {'all-reduce': 8}
  # No image, no activation: nothing is as large as one but kernels.
  params = jax.tree.leaves(run.abstract_state().params)
  kernels = unordered(x.shape for x in params)
  one_image = np.prod(run.spec.image_shape)
  for shape in unordered(shape for i in found for shape in i.shapes):
    assert shape in kernels or np.prod(shape) < one_image


@pytest.mark.usefixtures('tiny_model')
def test_the_compiled_sub_steps_share_no_result_and_the_attack_no_collective():
  run, step = compiled(2)
  entry = helpers.Entry(step.as_text())
  leaves = jax.tree_util.tree_leaves_with_path(run.abstract_state())
  fields = [path[0].name for path, _ in leaves]
  fields += ['metrics'] * (len(entry.root.operands) - len(fields))

  def origin(*wanted):
    """What the output fields `wanted` are computed from."""
    outputs = zip(fields, entry.root.operands, strict=True)
    return entry.ancestors(name for field, name in outputs if field in wanted)

  def arguments(found):
    return {i.source.split('[')[0] for i in found if i.kind == 'parameter'}

  attack = origin('perturbation')
  assert arguments(attack) == {'state.step', 'state.params', 'next_batch'}
  assert 'all-reduce' not in {i.kind for i in attack}
  update = origin('params', 'opt_state', 'batch_stats', 'ema', 'metrics')
  assert {'batch', 'state.perturbation.images'} <= arguments(update)
  assert 'next_batch' not in arguments(update)
  assert 'all-reduce' in {i.kind for i in update}


@pytest.mark.usefixtures('tiny_model')
def test_the_state_stays_where_it_belongs():
  run, step = compiled(8)
  state, _ = step.output_shardings
  assert state == jax.tree.map(lambda s: s.sharding, run.abstract_state())
  shape = (2, 8, *run.spec.image_shape)
  assert state.perturbation.images.shard_shape(shape) == (1, 2, *shape[2:])
  assert all(s.is_fully_replicated for s in jax.tree.leaves(state.params))
