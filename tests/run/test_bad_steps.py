"""Bad numbers: never applied, on no device; said, counted and recorded."""

import dataclasses
import functools
import json
import math
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conadv_jax import experiment, models
from conadv_jax.base.errors import NonFiniteError
from conadv_jax.checkpoints import checksum
from conadv_jax.checkpoints.checkpoint import Checkpoints
from conadv_jax.method.spikes import judge_loss, no_spikes
from conadv_jax.method.staleness import pending_perturbation
from conadv_jax.method.state import Stream, copied, stream_key
from conadv_jax.run import bad_steps, feed

# ---- A step with faults ----------------------------------------------------

# An image that is all of this grey level spoils its step in this way.
FAULTS = {
  'clean loss is nan': 1,
  'clean loss is inf': 2,
  'adversarial loss is nan': 3,
  'clean gradient is nan': 4,
  'adversarial gradient is nan': 5,
  'gradient norm overflows': 6,
  'variance is inf': 7,
  'attack is nan': 8,
  'loss is high': 9,
}
SPIKE = {'spike.sigmas': 6.0, 'spike.window_steps': 4, 'spike.max_in_a_row': 2}
PLACE = 5, 3  # group and example of the bad image: on device 5 of 8
LABEL = 1  # of that image
LAYOUTS = (  # devices, microbatches, more fields
  (8, 1, ()),
  pytest.param((1, 1, ()), marks=pytest.mark.slow),
  pytest.param((2, 2, ()), marks=pytest.mark.slow),
  pytest.param((8, 1, (('bn_group_size', 16),)), marks=pytest.mark.slow),
  pytest.param((8, 1, (('shard_optimizer', True),)), marks=pytest.mark.slow),
  pytest.param((8, 1, (('staleness_steps', 2),)), marks=pytest.mark.slow),
)


@jax.custom_vjp
def times_backward(x, factor):
  """`x`, whose gradient is multiplied by `factor`."""
  del factor
  return x


times_backward.defvjp(
  lambda x, factor: (x, factor),
  lambda factor, g: (g * factor, jnp.zeros_like(factor)),
)


def with_faults(apply_fn, spec):
  """`apply_fn` that fails where an image asks for it."""

  def faulty(variables, x_GVbHWC, routes, train, *args):
    pixels = x_GVbHWC[:, 0] * spec.std[0] + spec.mean[0]
    axes = (-3, -2, -1)
    flat_Gb = pixels.max(axes) == pixels.min(axes)
    level_Gb = jnp.where(flat_Gb, jnp.round(pixels.mean(axes)), 0)
    views = jnp.arange(x_GVbHWC.shape[1])[None, :, None, None]
    is_attack = len(routes) == 1

    def where(fault, view=None):  # [G, V, b, 1]
      hit = (level_Gb == FAULTS[fault])[:, None, :, None]
      return hit & (views == view) if view is not None else hit

    logits, stats = apply_fn(variables, x_GVbHWC, routes, train, *args)
    if is_attack:
      bad = where('attack is nan')
      return times_backward(logits, jnp.where(bad, jnp.nan, 1.0)), stats
    factor = jnp.where(where('clean gradient is nan', 0), jnp.nan, 1.0)
    factor *= jnp.where(where('adversarial gradient is nan', 1), jnp.nan, 1.0)
    factor *= jnp.where(where('gradient norm overflows'), 1e25, 1.0)
    logits = times_backward(logits, factor)
    logits = jnp.where(where('clean loss is nan', 0), jnp.nan, logits)
    logits = jnp.where(where('adversarial loss is nan', 1), jnp.nan, logits)
    is_label = jnp.arange(logits.shape[-1]) == LABEL
    infinite = where('clean loss is inf', 0) & is_label
    logits = jnp.where(infinite, -jnp.inf, logits)
    logits -= jnp.where(where('loss is high') & is_label, 200.0, 0.0)
    overflow = where('variance is inf').any()
    stats = jax.tree_util.tree_map_with_path(
      lambda path, leaf: (
        leaf.at[0, 0].set(jnp.where(overflow, jnp.inf, leaf[0, 0]))
        if path[-1].key == 'var'
        else leaf
      ),
      stats,
    )
    return logits, stats

  return faulty


@functools.cache
def faulty_run(layout):
  """(the run, its compiled step, good batches) with `with_faults`."""
  devices, microbatches, more = layout
  cfg = helpers.make_config(
    {
      'model': 'tiny',
      'batch_size': 64,
      'bn_group_size': 8,
      'microbatches': microbatches,
      'ema.decay': 0.9,
      'optimizer.learning_rate': 0.01,
    }
    | SPIKE
    | dict(more)
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, 'tiny', models.Entry(helpers.TinyNet, 4))
    run = experiment.build(cfg, jax.devices()[:devices])
  run = dataclasses.replace(run, apply_fn=with_faults(run.apply_fn, run.spec))
  return run, run.compile_step(), helpers.random_batches(cfg, 3, spec=run.spec)


def put(run, batch):
  return run.put_batch(
    {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
  )


def spoil(batch, fault):
  """`batch` with one image that makes the step fail."""
  batch = {name: np.array(x) for name, x in batch.items()}
  place = np.ravel_multi_index(PLACE, (8, 8))
  at = np.unravel_index(place, batch['label'].shape)
  batch['clean'][at] = FAULTS[fault]
  batch['label'][at] = LABEL
  return batch


KEPT = ('params', 'batch_stats', 'opt_state', 'ema')


def kept(state):
  """The bytes of what an update changes, which all copies must share."""
  found = []
  for leaf in jax.tree.leaves([getattr(state, name) for name in KEPT]):
    if leaf.sharding.is_fully_replicated:
      copies = {np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
      assert len(copies) == 1
    found.append(np.asarray(leaf).tobytes())
  return found


def counts(state):
  return int(state.nonfinite_steps), int(state.nonfinite_streak)


def assert_rate(run, metrics, applied):
  """That of the update after `applied` ones; the next differs by 1e-3."""
  expected = pytest.approx(float(run.schedule(applied)), rel=1e-6)
  assert float(metrics['learning_rate']) == expected


@pytest.mark.parametrize('layout', LAYOUTS)
def test_bad_numbers_anywhere_are_applied_nowhere(layout):
  run, step, good = faulty_run(layout)
  a, b, c = (put(run, batch) for batch in good)
  state = pending_perturbation(run.config, step, run.init_state(), a)
  state, _ = step(state, a, b)
  skipped = 0
  for fault in filter('loss is high'.__ne__, FAULTS):
    bad = put(run, spoil(good[2], fault))
    if fault == 'attack is nan':
      # The attack on the bad batch comes first; the update beside it is fine.
      before = kept(state)
      state, _ = step(state, b, bad)
      assert kept(state) != before
      assert not np.isfinite(state.perturbation.images).all()
      state, _ = step(copied(state), bad, b)
    else:
      state, _ = step(state, b, bad)
      before = copied(state)
      state, metrics = step(state, bad, b)
      finite = np.isfinite([metrics['loss'], metrics['grad_norm']])
      assert finite.all() == (fault == 'variance is inf'), fault
      assert finite[0] == ('loss' not in fault), fault
      if fault == 'clean loss is inf':
        assert np.isposinf(metrics['loss_clean'])
        assert np.isfinite(metrics['loss_adv'])
      if fault == 'gradient norm overflows':
        assert np.isposinf(metrics['grad_norm'])
      assert kept(state) == kept(before), fault
    skipped += 1
    assert counts(state) == (skipped, 1), fault
    _, nonfinite = checksum.checksums(state.replace(perturbation=None))
    assert not nonfinite, fault

    # The next step is what it would have been without the bad one.
    before = copied(state)
    state, metrics = step(state, b, c)
    assert counts(state) == (skipped, 0), fault
    assert kept(state) != kept(before), fault
    assert np.isfinite(metrics['loss']), fault
    applied = int(state.step) - 1 - skipped
    assert_rate(run, metrics, applied)
  assert int(state.spikes.steps) == 0


# ---- Losses that jump --------------------------------------------------------


class Judge:
  """Spikes in plain Python, float64: what the step is compared with."""

  def __init__(self, sigmas, window, max_in_a_row):
    self.sigmas, self.window, self.max = sigmas, window, max_in_a_row
    self.applied, self.steps, self.streak = [], 0, 0

  def __call__(self, loss):
    """Whether the update is applied."""
    if not math.isfinite(loss):
      return False
    if len(self.applied) >= self.window:
      last = np.array(self.applied[-self.window :])
      deviation = max(last.std(), 1e-3 * max(abs(last.mean()), 1.0))
      if loss > last.mean() + self.sigmas * deviation:
        if self.streak < self.max:
          self.steps, self.streak = self.steps + 1, self.streak + 1
          return False
        self.applied = []
    self.applied.append(loss)
    self.streak = 0
    return True


def series(rng):
  """Losses that fall, with jumps, plateaus, changes of level and nan."""
  losses = 3 * np.exp(-np.arange(600) / 200) + 0.05 * rng.standard_normal(600)
  losses[100:140] = 2.0  # constant: rounding is no spike
  losses[140:160] = 2.0 + 1e-7 * rng.standard_normal(20)
  losses[rng.choice(600, 25, replace=False)] += rng.uniform(0.1, 9, 25)
  losses[300:380] += 2.0  # the level moves, and back
  losses[rng.choice(600, 25, replace=False)] = np.nan
  losses[450:460] = np.inf
  return losses


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('window, sigmas, in_a_row', [(2, 3, 1), (16, 6, 5)])
def test_spikes_are_those_of_plain_python(window, sigmas, in_a_row):
  cfg = helpers.make_config(
    {
      'spike.sigmas': float(sigmas),
      'spike.window_steps': window,
      'spike.max_in_a_row': in_a_row,
      'dtype': 'float64',
    }
  )
  losses = series(np.random.default_rng(window))

  def one(spikes, loss):
    applied, spikes, metrics = judge_loss(cfg, spikes, loss, jnp.isfinite(loss))
    return spikes, (applied, metrics['spike_steps'], metrics['spike_streak'])

  _, found = jax.jit(lambda x: jax.lax.scan(one, no_spikes(cfg), x))(
    jnp.array(losses)
  )
  judge, expected = Judge(sigmas, window, in_a_row), []
  for loss in losses:
    expected.append((judge(loss), judge.steps, judge.streak))
  assert list(zip(*(x.tolist() for x in found), strict=True)) == expected
  # It has seen spikes, and rows of them that it took for a new level.
  streaks = [streak for *_, streak in expected]
  assert judge.steps > 10 and max(streaks) == in_a_row


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_step_whose_loss_jumps_is_skipped_and_counted(layout, tmp_path):
  run, step, good = faulty_run(layout)
  high = spoil(good[2], 'loss is high')
  # Four fill the window; of four high ones in a row the third is applied.
  batches = [good[i % 2] for i in range(5)] + [high, good[0]] + [high] * 4
  batches = [put(run, batch) for batch in (*batches, good[0])]
  judge = Judge(6.0, 4, 2)
  state = pending_perturbation(run.config, step, run.init_state(), batches[0])
  verdicts = ''
  for t in range(len(batches) - 1):
    if t == 6:  # within a row and a window: nothing of them may be lost
      state = restored(run, step, state, batches[t], tmp_path)
    before = copied(state)
    skipped = int(before.spikes.steps)
    state, metrics = step(state, batches[t], batches[t + 1])
    applied = judge(float(metrics['loss']))
    assert (kept(state) != kept(before)) == applied
    assert counts(state) == (0, 0)
    assert metrics['spike_steps'] == judge.steps == int(state.spikes.steps)
    assert metrics['spike_streak'] == judge.streak
    assert np.isfinite(metrics['spike_limit']) == (t > 3 and t < 10)
    assert_rate(run, metrics, t - skipped)
    assert int(state.step) == t + 1
    verdicts += '.' if applied else 'x'
  assert verdicts == '.....x.xx..'


def restored(run, step, state, batch, path):
  """`state` after a save and a restore."""
  checkpoints = Checkpoints(path)
  checkpoints.save(int(state.step), state)
  checkpoints.wait(int(state.step))
  _, found, _ = checkpoints.restore(run.abstract_state())
  checkpoints.close()
  assert helpers.bits(found.spikes) == helpers.bits(state.spikes)
  found = pending_perturbation(run.config, step, found, batch)
  assert helpers.bits(found) == helpers.bits(state)
  return found


def test_a_run_that_does_not_look_for_spikes_has_nothing_of_them():
  cfg = helpers.make_config()
  assert no_spikes(cfg) is None
  finite = jnp.array(True)
  result = judge_loss(cfg, None, jnp.array(9.0), finite)
  assert result == (finite, None, {})


# ---- Records -----------------------------------------------------------------

IDS = {batch: np.arange(6) + 10 * batch for batch in range(300)}
GOOD = dict.fromkeys(('nonfinite_streak', 'spike_streak'), 0)


def watch(path, steps=(), **fields):
  cfg = helpers.make_config({'seed': 3, 'max_nonfinite_steps': 3} | fields)
  places = np.array([2, 0, 1, 5, 4, 3])
  run = types.SimpleNamespace(config=cfg, local_positions=lambda: places)
  ids = feed.ExampleIds(0, keep=300)
  for batch in IDS.values():
    ids.add(batch)
  return bad_steps.NonFiniteWatch(run, path, ids, lambda: steps)


def values(loss=2.0, grad_norm=1.5, **counters):
  numbers = {'loss': loss, 'loss_adv': loss, 'grad_norm': grad_norm}
  numbers = {name: np.float32(x) for name, x in numbers.items()}
  return (
    numbers
    | {'spike_limit': np.float32(2.5), 'trust_ratios': np.ones(3)}
    | GOOD
    | counters
  )


def recorded(path):
  return sorted(int(file.stem) for file in path.glob('bad_steps/*.json'))


def test_a_bad_step_is_said_and_recorded_one_step_later(tmp_path, capsys):
  judge = watch(tmp_path, steps=[5, 10, 12, 15])
  judge.check(11, values())
  judge.check(12, values(loss=np.inf, grad_norm=np.nan, nonfinite_streak=1))
  assert not recorded(tmp_path)  # that step is still queued
  judge.check(13, values(loss=3.1, spike_streak=1))
  judge.check(14, values())
  judge.finish()
  assert recorded(tmp_path) == [12, 13]
  record = json.loads((tmp_path / 'bad_steps/12.json').read_text())
  order = [1, 2, 0, 5, 4, 3]  # of places [2, 0, 1, 5, 4, 3]
  assert record == {
    'step': 12,
    'reason': 'loss not finite',
    'loss': 'inf',
    'loss_adv': 'inf',
    'grad_norm': 'nan',
    'spike_limit': 2.5,
    'seed': 3,
    'staleness_steps': 1,
    'attack_key': key(3, 11),
    'next_attack_key': key(3, 12),
    'newest_checkpoint': 10,
    'example_ids': [110 + i for i in order],
    'next_example_ids': [120 + i for i in order],
  }
  record = json.loads((tmp_path / 'bad_steps/13.json').read_text())
  assert record['reason'] == 'spike'
  assert record['loss'] == np.float32(3.1)  # to the bit
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 2
  assert lines[0].startswith('step 12: loss inf, gradient norm nan: loss not')
  assert 'step 13: loss 3.1 above 2.5' in lines[1]
  assert 'spike, update not applied (1 in a row)' in lines[1]


def key(seed, batch):
  words = jax.random.key_data(stream_key(seed, Stream.ATTACK, batch))
  return [int(word) for word in words]


@pytest.mark.parametrize(
  'numbers, reason',
  [
    (dict(loss=np.nan, grad_norm=np.nan), 'loss not finite'),
    (dict(grad_norm=np.inf), 'gradient norm not finite'),
    (dict(), 'batch statistics not finite'),
  ],
)
def test_the_reason_is_what_is_not_finite(numbers, reason, tmp_path):
  judge = watch(tmp_path)
  judge.check(4, values(nonfinite_streak=1, **numbers))
  judge.finish()
  record = json.loads((tmp_path / 'bad_steps/4.json').read_text())
  assert record['reason'] == reason
  assert record['newest_checkpoint'] is None


def test_a_row_of_bad_steps_ends_the_run(tmp_path):
  judge = watch(tmp_path)
  judge.check(7, values(np.nan, nonfinite_streak=1))
  judge.check(8, values(3.0, spike_streak=1))  # ends the row
  for streak in (1, 2, 3):
    judge.check(8 + streak, values(np.nan, nonfinite_streak=streak))
  with pytest.raises(NonFiniteError) as error:
    judge.check(12, values())
  text = str(error.value)
  assert '3 steps in a row, 9 to 11, were not finite' in text
  assert 'ids of step 9: 81, 82, 80, 85, 84, 83' in text
  assert f'--workdir={tmp_path} --replay=9' in text
  assert recorded(tmp_path) == [7, 8, 9, 10, 11]


def test_the_last_step_ends_the_run_too(tmp_path):
  judge = watch(tmp_path)
  judge.check(7, values(np.nan, nonfinite_streak=3))  # of an earlier start
  with pytest.raises(NonFiniteError, match='5 to 7.*of step 7: 61'):
    judge.finish()


def test_records_are_bounded_and_leave_room_for_what_ends_a_run(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(bad_steps, 'MAX_FILES', 4)

  def go_on(first, last, **numbers):
    judge = watch(tmp_path)
    for step in range(first, last + 1):
      judge.check(step, values(**numbers))
    judge.finish()

  go_on(1, 3, spike_streak=1)
  assert recorded(tmp_path) == [1, 2]
  assert 'step 3 is not recorded' in capsys.readouterr().out
  go_on(2, 4, spike_streak=1)  # resumed: the same file again
  assert recorded(tmp_path) == [1, 2]
  go_on(5, 7, loss=np.nan, nonfinite_streak=1)
  assert recorded(tmp_path) == [1, 2, 5, 6]
  out = capsys.readouterr().out
  assert 'step 7 is not recorded' in out and 'holds 4 bad steps' in out
  assert 'counted only' in out
