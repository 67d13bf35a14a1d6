"""Processes of a study: their cores, what they are told, how they stop.

Programs that do next to nothing stand for training.
"""

import os
import signal
import sys
import textwrap
import threading
import time

import pytest
from studies import fake_row, make

from conadv_jax.base.errors import Preempted
from conadv_jax.run.lock import RunLock
from conadv_jax.study import results, runner
from conadv_jax.study.design import Arm, Cell
from conadv_jax.study.record import Record

LIST_CORES = """
import os, pathlib, sys
path = pathlib.Path(sys.argv[-1].partition('=')[2])
with open(path / 'cores.txt', 'a') as file:
  print(sorted(os.sched_getaffinity(0)), *sys.argv[1:-1], file=file)
"""


def test_processes_have_cores_of_their_own(tmp_path, monkeypatch):
  cores = sorted(os.sched_getaffinity(0))[:2]
  if len(cores) < 2:
    pytest.skip('needs two cores')
  program = (sys.executable, '-c', LIST_CORES)
  monkeypatch.setattr(runner, '_TRAIN', program)
  monkeypatch.setattr(runner, '_ANALYSE', (*program, 'analysis'))
  monkeypatch.setattr(results, 'row_of', lambda cell, *_: fake_row(cell))
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(cores))
  record = Record(tmp_path / 'w', 'mine')
  study = make(analyse=('--probes=3',), analysed=('b',))
  cells = list(study.final_cells({}))
  with runner.Runner(record, 2) as running:
    running.run(cells)
  seen = set()
  for cell in cells:
    path = tmp_path / 'w' / 'cells' / cell.name / 'cores.txt'
    trained, *analysed = path.read_text().splitlines()
    core = trained.partition(']')[0].strip('[')
    seen.add(int(core))
    assert trained == ' '.join(
      [f'[{core}]', *cell.flags, '--config.plots=False']
    )
    is_analysed = cell.arm == 'b'
    assert analysed == [f'[{core}] analysis --probes=3'] * is_analysed
  assert seen <= set(cores)
  lines = (tmp_path / 'w' / 'study.log').read_text().splitlines()
  assert [line.split()[1] for line in lines] == ['1/3', '2/3', '3/3']
  assert [' left' in line for line in lines] == [True, True, False]


WAIT = """
import os, pathlib, sys, time
path = pathlib.Path(sys.argv[-1].partition('=')[2])
(path / 'began').touch()
end = time.monotonic() + 60
while 'slow' in path.parts and not (path.parents[1] / 'b/two/began').exists():
  if time.monotonic() > end:
    sys.exit(1)
  time.sleep(0.05)
"""


def test_nothing_waits_for_what_it_did_not_ask_for(tmp_path, monkeypatch):
  """One asks for a cell that ends only when the other's second one begins."""
  if len(os.sched_getaffinity(0)) < 2:
    pytest.skip('needs two cores')
  monkeypatch.setattr(runner, '_TRAIN', (sys.executable, '-c', WAIT))
  monkeypatch.setattr(
    results, 'row_of', lambda cell, _, s: fake_row(cell) | {'status': s}
  )

  def cell(arm, run, seed):
    return Cell('digits', 'final', arm, run, {'seed': seed})

  def steps(*cells):
    rows = []
    for each in cells:
      rows += yield [each]
    return [row['cell'] for row in rows if row['status'] == 'done']

  same = cell('b', 'again', 1)  # the settings of a cell that ended
  asked = {
    'a': steps(cell('a', 'slow', 0)),
    'b': steps(cell('b', 'one', 1), cell('b', 'two', 2), same),
  }
  record = Record(tmp_path / 'w', 'mine')
  with runner.Runner(record, 2) as running:
    values = running.drive(asked)
  assert values == {
    'a': ['final/a/slow'],
    'b': ['final/b/one', 'final/b/two', 'final/b/again'],
  }
  assert not (tmp_path / 'w/cells/final/b/again').exists()


def test_the_time_left_is_of_the_mean_of_each_arm(tmp_path):
  record = Record(tmp_path / 'w', 'mine')
  running = runner.Runner(record, 1)
  running._seconds['a'] += [100.0, 300.0]
  running._seconds['b'] += [50.0]
  left = make(arms={name: Arm({}, 1) for name in 'abc'}).final_cells({})
  # 200 for a, 50 for b, and 150 for c, which has none: the mean of all.
  assert running._eta(list(left)) == ', 0:06:40 left'


# ---- Stopping ---------------------------------------------------------------

SLEEPER = """
import pathlib, signal, sys, time
path = pathlib.Path(sys.argv[-1].partition('=')[2])
def stop(*_):
  (path / 'saved').touch()
  sys.exit(42)
signal.signal(signal.SIGTERM, stop)
(path / 'began').touch()
time.sleep(60)
"""


def test_a_signal_saves_the_runs_and_says_how_to_go_on(tmp_path, monkeypatch):
  fake = tmp_path / 'sleep.py'
  fake.write_text(SLEEPER)
  monkeypatch.setattr(runner, '_TRAIN', (sys.executable, str(fake)))
  record = Record(tmp_path / 'w', 'mine')
  cells = list(make().final_cells({}))
  began = tmp_path / 'w' / 'cells' / cells[0].name / 'began'

  def interrupt():
    while not began.exists():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=interrupt).start()
  with runner.Runner(record, 1) as running:
    with pytest.raises(Preempted, match='3 runs left; run the same command'):
      running.run(cells)
  assert (began.parent / 'saved').exists()
  assert record.rows() == []


def test_a_run_that_is_left_behind_is_waited_for(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(runner, '_TRAIN', (sys.executable, '-c', ''))
  monkeypatch.setattr(runner, '_LOCK_SECONDS', 0.1)
  monkeypatch.setattr(results, 'row_of', lambda cell, *_: fake_row(cell))
  record = Record(tmp_path / 'w', 'mine')
  cell = next(make().final_cells({}))
  directory = tmp_path / 'w' / 'cells' / cell.name
  directory.mkdir(parents=True)
  held = RunLock(directory)
  held.__enter__()
  threading.Timer(1.0, held.release).start()
  start = time.monotonic()
  with runner.Runner(record, 1) as running:
    running.run([cell])
  assert time.monotonic() - start > 1
  assert capfd.readouterr().out.count('waiting: workdir=') == 1


def test_errors_are_read_from_the_end_of_a_log(tmp_path):
  (tmp_path / 'log.txt').write_text(
    textwrap.dedent("""\
      step 1
      error: first
      step 2
      error: second, of
      two lines
    """)
  )
  assert results.last_error(tmp_path) == 'second, of\ntwo lines'
  assert results.last_line(tmp_path) == 'two lines'
