"""A cloud that runs in the process of a test, and slices to ask it for."""

import json
import sys
import time

from conadv_jax.cloud import command

PROGRAMS = ('gcloud', 'ssh', 'scp')
SLICE = ['--name=run1', '--zone=us-east5-a']
NEW = [*SLICE, '--type=v5litepod-8']
# Ends with the next of the codes in a file of its own; 'x' of none: it stays.
TASK = ['sh', '-c', """
code=$(head -n 1 "$0")
sed -i 1d "$0"
echo "attempt of $0"
[ "$code" != x ] || sleep 1000
exit "$code"
"""]  # fmt: skip
# Stands for pip and uv on a worker; what they install is what is here.
PYTHON = f"""#!/bin/sh
echo "$*" >> "$HOME/installed"
case $* in *' venv '*)
  mkdir -p .venv/bin
  printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' > .venv/bin/python
  chmod +x .venv/bin/python
esac
"""


class Fake:
  """The cloud's folder, what a test wants of it, and what it was asked."""

  def __init__(self, root):
    self.root, self.sleeps, self.pause = root, [], 0.01
    self.interrupt_at, self.on_sleep = None, lambda: None
    (root / 'remote').mkdir()
    self.write(root / 'remote/python3', PYTHON)
    self.plan({})
    state = {'queued': {}, 'nodes': {}, 'calls': []}
    counts = dict.fromkeys(('created', 'stuck', 'busy', 'interrupted'), 0)
    (root / 'state.json').write_text(json.dumps(state | counts))

  @staticmethod
  def write(path, text):
    path.write_text(text)
    path.chmod(0o755)

  def plan(self, *creations, **whole):
    plan = {'creations': list(creations) or [{}]} | whole
    (self.root / 'plan.json').write_text(json.dumps(plan))

  @property
  def state(self):
    return json.loads((self.root / 'state.json').read_text())

  def calls(self, text):
    return [c for c in self.state['calls'] if text in ' '.join(c)]

  def sleep(self, seconds):
    self.sleeps.append(seconds)
    assert len(self.sleeps) < 300, 'it waits for ever'
    at = self.interrupt_at
    if at == len(self.sleeps) or (at == 'work' and self.is_at_work()):
      self.interrupt_at = None
      raise KeyboardInterrupt
    self.on_sleep()
    time.sleep(self.pause)

  def __call__(self, *arguments):
    return command.main(arguments, sleep=self.sleep)

  def task(self, *codes, worker=0):
    """TASK, which ends with `codes`, one after the other, on `worker`."""
    (self.root / f'codes{worker}').write_text('\n'.join(map(str, codes)) + '\n')
    return ['--', *TASK, str(self.root / 'codes{index}')]

  def supervise(self, *codes, flags=()):
    return self('supervise', *NEW, *flags, *self.task(*codes))

  def is_at_work(self):
    return 'x' not in (self.root / 'codes0').read_text()

  def is_empty(self):
    state = self.state
    homes = [p for p in self.root.rglob('jobs') if p.is_dir()]
    return not (state['queued'] or state['nodes'] or homes)
