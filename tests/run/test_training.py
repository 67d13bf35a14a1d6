"""The loop around the step: what it waits for, says, measures and traces."""

import time

import jax
import observed
import pytest
from observed import config_of

from conadv_jax import experiment, train
from conadv_jax.base.errors import ConfigError
from conadv_jax.devices import generations
from conadv_jax.run import guard, log, metrics, timeline

registered = observed.registered


def run(tmp_path, **fields):
  """Trains a tiny network; returns the rows that it logs of steps."""
  fields = {name.replace('__', '.'): value for name, value in fields.items()}
  settings = {'eval.attack': 'none', 'attack_stats_every_steps': 0} | fields
  train.train(config_of(settings), str(tmp_path))
  rows = metrics.read_metrics(tmp_path)
  return [row for row in rows if row['split'] == 'train']


# ---- Between two steps ------------------------------------------------------


def test_the_loop_waits_for_no_step_and_sends_nothing(tmp_path, monkeypatch):
  """But for the counters of the step before, so that one is always queued."""
  made, waited = [], []

  class Compiled:
    def __init__(self, step_fn):
      self._step_fn = step_fn

    def __call__(self, *args):
      state, values = self._step_fn(*args)
      made.append(values)
      return state, values

  compile_step = experiment.Run.compile_step
  monkeypatch.setattr(
    experiment.Run, 'compile_step', lambda self: Compiled(compile_step(self))
  )
  enter, device_get = guard.Guard.enter, jax.device_get

  def entered(self, phase, step=None):
    if (phase, step) == ('input', 4):
      jax.config.update('jax_transfer_guard', 'disallow')
    if (phase, step) == ('input', 9):
      jax.config.update('jax_transfer_guard', 'allow')
    return enter(self, phase, step)

  def fetched(values):
    if jax.config.jax_transfer_guard == 'disallow':
      before = {id(x) for x in jax.tree.leaves(made[-2])}
      waited.append([id(x) in before for x in jax.tree.leaves(values)])
    return device_get(values)

  monkeypatch.setattr(guard.Guard, 'enter', entered)
  monkeypatch.setattr(jax, 'device_get', fetched)
  monkeypatch.setattr(jax, 'block_until_ready', block := Blocked())
  try:
    run(tmp_path, max_steps=10, log_every_steps=10)
  finally:
    jax.config.update('jax_transfer_guard', 'allow')
  assert waited == [[True]] * 5  # steps 4 to 8
  assert not block.in_steps


class Blocked:
  """`jax.block_until_ready`, which keeps whether the loop has called it."""

  def __init__(self):
    self.in_steps = False
    self._block = jax.block_until_ready

  def __call__(self, values):
    self.in_steps |= jax.config.jax_transfer_guard == 'disallow'
    return self._block(values)


def test_a_slow_run_says_that_it_is_alive(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(timeline.Ticker, '_FIRST_SECONDS', 0)
  run(tmp_path, max_steps=4, log_every_steps=4)
  said = capsys.readouterr().out.splitlines()
  alive = [line for line in said if line.startswith('step ')]
  assert [line.split()[1] for line in alive] == [
    '1/4',
    '2/4',
    '3/4',
    '4/4',
    '4/4',
  ]
  assert all('ETA 0:' in line for line in alive)


def test_a_word_is_due_after_ten_seconds_and_then_less_often(monkeypatch):
  now = [50.0]
  monkeypatch.setattr(timeline.time, 'monotonic', lambda: now[0])
  ticker, due = timeline.Ticker(), []
  for second in range(1, 1200):
    now[0] = 50.0 + second
    if ticker.due():
      due.append(second)
  assert due == [10, 30, 70, 150, 310, 610, 910]
  ticker.heard()
  now[0] += 299
  assert not ticker.due()


# ---- What is measured -------------------------------------------------------


@pytest.mark.slow
def test_goodput_is_training_over_all_time_since_the_first_start(
  tmp_path, monkeypatch
):
  rows = run(tmp_path, max_steps=4, log_every_steps=1)
  assert all(0 < row['goodput_percent'] < 100 for row in rows)
  clock = time.time
  monkeypatch.setattr(time, 'time', lambda: clock() + 1000)  # a long pause
  rows = run(tmp_path, max_steps=8, log_every_steps=1)
  last = rows[-1]
  assert last['step'] == 8
  seconds = 100 * last['seconds'] / last['goodput_percent']
  assert 1000 < seconds < 1100
  assert 'mfu_percent' not in last  # the peak of a CPU is not known


def test_mfu_counts_what_is_not_computed_again(monkeypatch):
  peak = 1e9
  monkeypatch.setattr(log, 'peak_flops_per_sec', lambda kind: peak)
  base = {'model': 'resnet18', 'method': 'conadv', 'batch_size': 16}
  plain, again = (
    experiment.build(config_of(base | {'remat': remat}))
    for remat in ('none', 'blocks')
  )
  assert again.flops_per_device() > plain.flops_per_device()
  for made in (plain, again):
    percent = log.mfu_percent(made)
    assert percent == 100 * plain.flops_per_device() / 16 / peak
  monkeypatch.setattr(log, 'peak_flops_per_sec', lambda kind: None)
  assert log.mfu_percent(plain) is None


@pytest.mark.parametrize(
  'kind, peak',
  [
    ('TPU v3', 61.5e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5', 459e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H200', 989e12),
    ('cpu', None),
  ],
)
def test_peaks_by_the_names_of_devices(kind, peak):
  assert generations.peak_flops_per_sec(kind) == peak


# ---- Traces and the start ---------------------------------------------------


@pytest.mark.parametrize(
  'steps', ['3', '0:2', '3:3', '4:2', 'a:b', '1:2:3', ':']
)
def test_steps_of_a_trace_that_are_none_are_refused(steps):
  with pytest.raises(ConfigError, match=r"profile\.steps='.*FIRST:END"):
    config_of({'profile.steps': steps})


def test_a_trace_beyond_the_run_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='the run has steps 1 to 4'):
    run(tmp_path, max_steps=4, profile__steps='3:6')
  assert not (tmp_path / 'metrics.jsonl').exists()


@pytest.mark.slow
def test_a_trace_is_of_the_steps_that_were_asked_for(
  tmp_path, monkeypatch, capsys
):
  entered, calls = [], []
  enter = guard.Guard.enter

  def enter_(self, phase, step=None):
    entered.append(step)
    return enter(self, phase, step)

  monkeypatch.setattr(guard.Guard, 'enter', enter_)
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda path: calls.append((entered[-1], path))
  )
  monkeypatch.setattr(
    jax.profiler, 'stop_trace', lambda: calls.append((entered[-1],))
  )
  run(tmp_path, max_steps=5, profile__steps='2:4')
  assert calls == [(2, str(tmp_path / 'profile')), (4,)]
  assert f'tensorboard --logdir={tmp_path}/profile' in capsys.readouterr().out
  run(tmp_path, max_steps=6, profile__steps='4:6')
  assert len(calls) == 2
  assert 'no trace, step 5 is done' in capsys.readouterr().out


def test_the_parts_of_a_start_add_up(monkeypatch):
  wall, cpu = iter([100.0, 103.0, 107.5, 108.0]), iter([2.0, 5.0, 6.0])
  monkeypatch.setattr(timeline.time, 'time', lambda: next(wall))
  monkeypatch.setattr(timeline.time, 'process_time', lambda: next(cpu))
  line = timeline.Timeline()
  line.enter('build')
  line.enter('compile')
  rows = [text.split() for text in line.table().splitlines()[1:]]
  assert rows == [
    ['imports', '3.00', '2.00'],
    ['build', '4.50', '3.00'],
    ['compile', '0.50', '1.00'],
    ['in', 'all', '8.00', '6.00'],
  ]
