"""Stands for gcloud, ssh and scp, by its name; its cloud is a folder.

Queued resources pass through states at each look; nodes come with ACTIVE. The
workers' homes are folders, and what is sent to them by ssh runs there. Its
plan, in plan.json, has an entry for each creation:

  states          of the queued resource, one for each look
  workers         of each node
  error           of the creation
  preempt         whether nodes are taken away when a task of theirs stays
and for the whole cloud:
  interrupt       text of the call that sends a Ctrl-C to its caller, after it
  stuck           number of deletions that fail
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

ROOT = pathlib.Path(os.environ['FAKE_CLOUD'])


def fail(message, code=1):
  print(f'ERROR: (gcloud) {message}', file=sys.stderr)
  sys.exit(code)


def flag(name, default=None):
  found = [a for a in sys.argv if a.startswith(f'--{name}=')]
  return found[0].partition('=')[2] if found else default


def kill(folder):
  for file in folder.rglob('pid'):
    try:
      os.killpg(int(file.read_text()), signal.SIGKILL)
    except (ProcessLookupError, ValueError):
      pass
  shutil.rmtree(folder, ignore_errors=True)


class Cloud:
  """What state.json has: resources and nodes by name, and counts."""

  def __init__(self, state, plan):
    self.state, self.plan = state, plan
    self.queued, self.nodes = state['queued'], state['nodes']

  def entry(self):
    number = min(self.state['created'], len(self.plan['creations'])) - 1
    return {
      'states': ['ACCEPTED', 'PROVISIONING', 'ACTIVE'],
      'workers': 1,
    } | self.plan['creations'][number]

  def make_nodes(self, names):
    for name in names:
      self.nodes[name] = {
        'state': 'READY',
        'networkEndpoints': [{}] * self.entry()['workers'],
      }
      for index in range(self.entry()['workers']):
        (ROOT / name / str(index)).mkdir(parents=True, exist_ok=True)

  def preempt(self):
    for name in self.nodes:
      self.nodes[name]['state'] = 'PREEMPTED'
      kill(ROOT / name)
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
    count, prefix = flag('node-count'), flag('node-prefix')
    nodes = [flag('node-id')]
    if count:
      nodes = [f'{prefix}-{i}' for i in range(int(count))]
    self.queued[name] = {'states': self.entry()['states'], 'nodes': nodes}

  def describe(self, kind, name):
    if name not in (self.nodes if kind == 'tpu-vm' else self.queued):
      fail(f'NOT_FOUND: {name} was not found')
    if kind == 'tpu-vm':
      return print(json.dumps(self.nodes[name]))
    resource = self.queued[name]
    state, *later = resource['states']
    resource['states'] = later or [state]
    if state == 'ACTIVE' and resource['nodes'][0] not in self.nodes:
      self.make_nodes(resource['nodes'])
    answer = {'state': state}
    if state == 'FAILED':
      answer['failedData'] = {'error': {'message': 'no such capacity'}}
    print(json.dumps({'state': answer}))

  def delete(self, kind, name):
    if self.plan.get('stuck', 0) > self.state['stuck']:
      self.state['stuck'] += 1
      fail('UNAVAILABLE: try again')
    names = [name]
    if kind == 'queued-resources':
      names = self.queued[name]['nodes']
      if any(n in self.nodes for n in names) and '--force' not in sys.argv:
        fail('FAILED_PRECONDITION: has nodes')
      del self.queued[name]
    for node in names:
      self.nodes.pop(node, None)
      kill(ROOT / node)


def home(cloud, name, index):
  if cloud is not None and cloud.nodes.get(name, {}).get('state') != 'READY':
    fail('ssh: connection closed', 255)
  folder = ROOT / name / str(index)
  if f'{name}/{index}' in (cloud.plan.get('silent', []) if cloud else []):
    fail('ssh: connection timed out', 255)
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def remote(folder, text):
  path = f'{ROOT}/remote:{os.environ["PATH"]}'
  environment = os.environ | {'HOME': str(folder), 'PATH': path}
  return subprocess.run(
    ['sh', '-c', text], cwd=folder, env=environment, check=False
  ).returncode


def main():
  program = pathlib.Path(sys.argv[0]).name
  words = [a for a in sys.argv[1:] if not a.startswith('-')]
  with open(ROOT / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    plan = json.loads((ROOT / 'plan.json').read_text())
    state = json.loads((ROOT / 'state.json').read_text())
    cloud = Cloud(state, plan)
    line = ' '.join(sys.argv[1:])
    state['calls'].append([program, *sys.argv[1:]])
    interrupt = plan.get('interrupt')
    hit = interrupt and interrupt in line and not state['interrupted']
    state['interrupted'] = bool(hit or state['interrupted'])
    if ' poll ' in line and cloud.entry().get('preempt'):
      if 'x' not in (ROOT / 'codes0').read_text():
        cloud.preempt()
    run = None
    try:
      if program == 'gcloud':
        kind, verb = words[2:4]
        if verb in ('create', 'describe', 'delete'):
          getattr(cloud, verb)(kind, words[4])
        elif verb == 'ssh':
          run = home(cloud, words[4], flag('worker')), flag('command')
        else:
          *files, target = words[4:]
          copy(home(cloud, target.split(':')[0], flag('worker')), files)
      elif program == 'ssh':
        run = home(None, words[0], 0), words[1]
      else:
        *files, target = words
        copy(home(None, target.split(':')[0], 0), files)
    finally:
      (ROOT / 'state.json').write_text(json.dumps(state))
      if hit:
        os.kill(os.getppid(), signal.SIGINT)
  sys.exit(remote(*run) if run else 0)


def copy(folder, files):
  for file in files:
    shutil.copy(file, folder / 'conadv')


if __name__ == '__main__':
  main()
