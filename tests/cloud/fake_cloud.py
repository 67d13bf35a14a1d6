"""Stands for gcloud, ssh and scp; its cloud is a folder.

As a program it goes by its name. `call` does the same in the process of a test.

Queued resources and nodes pass through states, one for each look; nodes come
with ACTIVE. The workers' homes are folders, and what is sent to them by ssh
runs there. Its plan, in plan.json, has an entry for each creation:

  states          of the queued resource
  nodes           states of each node
  workers         of each node
  error           of the creation
  preempt         text in the log of a job at which nodes are taken away
and for the whole cloud:
  interrupt       text of the call that sends a Ctrl-C to its caller, after it
  stuck           number of deletions that fail
  busy            number of descriptions that fail
  silent          workers that ssh does not reach
"""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys


class Failed(Exception):
  """Ends a call: its message and exit code."""


def fail(message, code=1):
  raise Failed(f'ERROR: (gcloud) {message}', code)


def kill(folder):
  for file in folder.rglob('pid'):
    try:
      os.killpg(int(file.read_text()), signal.SIGKILL)
    except (ProcessLookupError, ValueError):
      pass
  shutil.rmtree(folder, ignore_errors=True)


class Cloud:
  """What state.json has: resources and nodes by name, and counts."""

  def __init__(self, root, arguments, state, plan):
    self.root, self.arguments = root, arguments
    self.state, self.plan = state, plan
    self.queued, self.nodes = state['queued'], state['nodes']

  def flag(self, name):
    found = [a for a in self.arguments if a.startswith(f'--{name}=')]
    return found[0].partition('=')[2] if found else None

  def entry(self):
    number = min(self.state['created'], len(self.plan['creations'])) - 1
    return {
      'states': ['WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE'],
      'nodes': ['CREATING', 'READY'],
      'workers': 1,
    } | self.plan['creations'][number]

  def make_nodes(self, names):
    for name in names:
      self.nodes[name] = {
        'states': self.entry()['nodes'],
        'networkEndpoints': [{}] * self.entry()['workers'],
      }
      for index in range(self.entry()['workers']):
        (self.root / name / str(index)).mkdir(parents=True, exist_ok=True)

  def preempt(self):
    for name in self.nodes:
      self.nodes[name]['states'] = ['PREEMPTED']
      kill(self.root / name)
    for resource in self.queued.values():
      resource['states'] = ['SUSPENDING', 'SUSPENDED']

  def create(self, kind, name):
    self.state['created'] += 1
    if name in self.queued or name in self.nodes:
      fail(f'ALREADY_EXISTS: {name}')
    if error := self.entry().get('error'):
      fail(error)
    if kind == 'tpu-vm':
      return self.make_nodes([name])
    count, prefix = self.flag('node-count'), self.flag('node-prefix')
    nodes = [self.flag('node-id')]
    if count:
      nodes = [f'{prefix}-{i}' for i in range(int(count))]
    self.queued[name] = {'states': self.entry()['states'], 'nodes': nodes}

  def fails(self, what):
    if self.plan.get(what, 0) > self.state[what]:
      self.state[what] += 1
      fail('UNAVAILABLE: try again')

  def describe(self, kind, name):
    self.fails('busy')
    resources = self.nodes if kind == 'tpu-vm' else self.queued
    if name not in resources:
      fail(f'NOT_FOUND: {name} was not found')
    resource = resources[name]
    state, *later = resource['states']
    resource['states'] = later or [state]
    if kind == 'tpu-vm':
      return json.dumps(resource | {'state': state})
    if state == 'ACTIVE' and resource['nodes'][0] not in self.nodes:
      self.make_nodes(resource['nodes'])
    answer = {'state': state}
    if state == 'FAILED':
      answer['failedData'] = {'error': {'message': 'no such capacity'}}
    return json.dumps({'state': answer})

  def delete(self, kind, name):
    self.fails('stuck')
    names = [name]
    if kind == 'queued-resources':
      names = self.queued[name]['nodes']
      if (
        any(n in self.nodes for n in names) and '--force' not in self.arguments
      ):
        fail('FAILED_PRECONDITION: has nodes')
      del self.queued[name]
    for node in names:
      self.nodes.pop(node, None)
      kill(self.root / node)

  def home(self, name, index, rented=True):
    node = self.nodes.get(name, {'states': []})
    if rented and node['states'] != ['READY']:
      fail('ssh: connection closed', 255)
    if f'{name}/{index}' in self.plan.get('silent', []):
      fail('ssh: connection timed out', 255)
    folder = self.root / name / str(index)
    folder.mkdir(parents=True, exist_ok=True)
    return folder

  def do(self, program, words):
    """Returns (what it prints, what is to be run in which home)."""
    if program == 'ssh':
      return '', (self.home(words[0], 0, rented=False), words[1])
    if program == 'scp':
      folder = self.home(words[-1].split(':')[0], 0, rented=False)
      return copy(words[:-1], folder), None
    kind, verb, *words = words[2:]
    if verb == 'ssh':
      folder = self.home(words[0], self.flag('worker'))
      return '', (folder, self.flag('command'))
    if verb == 'scp':
      folder = self.home(words[-1].split(':')[0], self.flag('worker'))
      return copy(words[:-1], folder), None
    return getattr(self, verb)(kind, words[0]) or '', None


def copy(files, folder):
  for file in files:
    shutil.copy(file, folder / 'conadv')
  return ''


def remote(root, folder, text):
  path = f'{root}/remote:{os.environ["PATH"]}'
  done = subprocess.run(
    ['sh', '-c', text],
    cwd=folder,
    env=os.environ | {'HOME': str(folder), 'PATH': path},
    capture_output=True,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def call(root, program, arguments, interrupt):
  """Returns (exit code, output, errors); calls `interrupt` where planned."""
  words = [a for a in arguments if not a.startswith('-')]
  line = ' '.join(arguments)
  with open(root / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    plan = json.loads((root / 'plan.json').read_text())
    state = json.loads((root / 'state.json').read_text())
    cloud = Cloud(root, arguments, state, plan)
    state['calls'].append([program, *arguments])
    if ' poll ' in line and (text := cloud.entry().get('preempt')):
      if any(text in log.read_text() for log in root.rglob('jobs/*/log')):
        cloud.preempt()
    hit = plan.get('interrupt', '\0') in line and not state['interrupted']
    state['interrupted'] = hit or state['interrupted']
    try:
      out, run = cloud.do(program, words)
    except Failed as failed:
      message, code = failed.args
      return code, b'', message.encode()
    finally:
      (root / 'state.json').write_text(json.dumps(state))
      if hit:
        interrupt()
  return remote(root, *run) if run else (0, out.encode(), b'')


def main():
  code, out, err = call(
    pathlib.Path(os.environ['FAKE_CLOUD']),
    pathlib.Path(sys.argv[0]).name,
    sys.argv[1:],
    lambda: os.kill(os.getppid(), signal.SIGINT),
  )
  sys.stdout.buffer.write(out)
  sys.stderr.buffer.write(err)
  sys.exit(code)


if __name__ == '__main__':
  main()
