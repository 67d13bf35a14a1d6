"""Training runs as processes that may die, without the cost of their start.

A server loads TensorFlow, JAX and the package once and forks a process for
each run. `python tests/forked.py` is the server: it reads a job per line, JSON,
and answers with the exit status of `os.waitpid`.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Server:
  """Forks runs of `conadv_jax.train` on `devices` CPU devices.

  The network of the tests has the name `tiny` there. The context ends it.
  """

  def __init__(self, devices: int):
    self._process = subprocess.Popen(
      [sys.executable, __file__],
      cwd=ROOT,
      env=os.environ
      | {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}',
        # It forks while TensorFlow has threads, which do nothing yet.
        'PYTHONWARNINGS': 'ignore',
      },
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __enter__(self) -> Server:
    return self

  def __exit__(self, *_) -> None:
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def run(
    self,
    arguments: Sequence[str],
    log: pathlib.Path,
    environment: Mapping[str, str] | None = None,
    module: str = 'train',
  ) -> int:
    """Runs to the end: its exit code, or minus the signal that killed it.

    With COMPILE_CACHE in `environment`, programs come from that directory.
    """
    job = {
      'arguments': list(arguments),
      'log': str(log),
      'environment': dict(environment or {}),
      'module': module,
    }
    self._process.stdin.write(json.dumps(job) + '\n')
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    assert answer, 'the server died'
    return os.waitstatus_to_exitcode(int(answer))

  def resident_bytes(self) -> int | None:
    """Memory of the run that is going on, None between two."""
    server = self._process.pid
    children = pathlib.Path(f'/proc/{server}/task/{server}/children')
    for child in children.read_text().split():
      try:
        pages = pathlib.Path(f'/proc/{child}/statm').read_text().split()[1]
      except OSError:
        continue  # it has just ended
      return int(pages) * os.sysconf('SC_PAGE_SIZE')
    return None


def main() -> None:
  import helpers

  from conadv_jax import models

  models.MODELS['tiny'] = models.Entry(helpers.TinyNet, 4)
  for line in sys.stdin:
    child = os.fork()
    if not child:
      _run(**json.loads(line))
    print(os.waitpid(child, 0)[1], flush=True)


def _run(
  arguments: list[str], log: str, environment: dict[str, str], module: str
) -> None:
  """In the child: the command, with everything it prints in `log`."""
  import importlib
  import traceback

  import jax

  from conadv_jax import cli
  from conadv_jax.base import faults
  from conadv_jax.run import feed

  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(output, 1)
  os.dup2(output, 2)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.environ |= environment
  faults._faults = faults._parse(environment.get('CONADV_FAULTS', ''))
  if record := environment.get('RECORD_IDS'):
    _record_ids(feed, record)
  if cache := environment.get('COMPILE_CACHE'):
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  command = importlib.import_module(f'conadv_jax.{module}')
  sys.argv = [module, *arguments]
  code = 0
  try:
    cli.run(getattr(command, 'main', None) or command.evaluate, '')
  except SystemExit as end:
    code = end.code or 0
  except BaseException:  # noqa: BLE001, the end of a process that was forked
    traceback.print_exc()
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _record_ids(feed, path: str) -> None:
  """Appends a line for each batch to `path`: its number and its ids."""
  add = feed.ExampleIds.add

  def add_and_write(self, ids):
    row = {'batch': self._next, 'ids': ids.tolist()}
    with open(path, 'a') as file:
      file.write(json.dumps(row) + '\n')
    add(self, ids)

  feed.ExampleIds.add = add_and_write


if __name__ == '__main__':
  main()
