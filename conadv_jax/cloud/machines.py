"""Slices of Cloud TPU, and machines that exist already, behind one interface.

Every command line is a list of arguments; a remote one is quoted by
shlex.join. The Cloud TPU API gets fixes only and does not know TPU7x.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from typing import Any

from conadv_jax.base.errors import CloudError, ConfigError
from conadv_jax.cloud.shell import Result, Shell
from conadv_jax.devices import topology
from conadv_jax.run.timeline import Ticker

READY, NOT_FOUND = 'READY', 'NOT_FOUND'
# In none of these will a slice become ready. Which are of queued resources and
# which of nodes: docs.cloud.google.com/tpu/docs/reference/rest/v2.
_LOST = {
  'FAILED', 'SUSPENDING', 'SUSPENDED', 'DELETING', 'PREEMPTED', 'TERMINATED',
  'STOPPING', 'STOPPED', 'REPAIRING', NOT_FOUND,
}  # fmt: skip
# Parts of gcloud's messages.
_TRANSIENT = (
  'RESOURCE_EXHAUSTED', 'UNAVAILABLE', 'INTERNAL', 'DEADLINE_EXCEEDED',
  'ABORTED', 'no more capacity', 'Connection', 'timed out',
)  # fmt: skip
_QUOTA = 'quota'
# A connection to a machine that is gone must end.
_SSH_OPTIONS = ('-oConnectTimeout=30', '-oServerAliveInterval=30')
_POLL_SECONDS = 20
_TRIALS = 6  # of a question, and of a deletion


@dataclasses.dataclass(frozen=True)
class Worker:
  """One machine.

  Attributes:
    label: for messages and files.
    node: name of its slice, or the machine's own.
    index: in the slice.
  """

  label: str
  node: str
  index: int = 0


class Hosts:
  """Machines that exist, reached by ssh."""

  label, rented = 'hosts', False

  def __init__(self, shell: Shell, names: Sequence[str]):
    """Takes the `names` as they are, USER@HOST or HOST."""
    self.shell = shell
    self._workers = [Worker(name, name) for name in names]

  def state(self) -> str:
    """READY: nothing is known of them before they are reached."""
    return READY

  def workers(self) -> list[Worker]:
    """In the order in which they were named."""
    return self._workers

  def ssh(self, worker: Worker, remote: Sequence[str]) -> list[str]:
    """The command that runs `remote` on `worker`."""
    options = ['-oBatchMode=yes', *_SSH_OPTIONS]
    return ['ssh', *options, worker.node, shlex.join(remote)]

  def copy(
    self, worker: Worker, files: Sequence[str], target: str
  ) -> list[str]:
    """The command that copies `files` to `target` in the home of `worker`."""
    command = ['scp', '-q', '-oBatchMode=yes', *_SSH_OPTIONS]
    return [*command, *files, f'{worker.node}:{target}']


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked of Cloud TPU.

  Attributes:
    name: of the queued resource and the node; several nodes add -0, -1, ...
    zone: where.
    project: '' for gcloud's own.
    type: such as v5litepod-256; '' if the slice exists.
    slices: number of nodes.
    tier: spot, reserved or on_demand.
    simple: a node without a queued resource.
    runtime_version: '' for the generation's.
  """

  name: str
  zone: str
  project: str = ''
  type: str = ''
  slices: int = 1
  tier: str = 'on_demand'
  simple: bool = False
  runtime_version: str = ''


class Slice:
  """Nodes of Cloud TPU, by `gcloud`."""

  rented = True

  def __init__(self, shell: Shell, request: Request, *, exists: bool):
    """Says nothing to Cloud TPU yet.

    Args:
      shell: runs gcloud.
      request: what is, or will be, there.
      exists: what a dry run takes for granted.

    Raises:
      ConfigError: for a type that Cloud TPU does not have.
    """
    self.shell, self._request, self._dry_exists = shell, request, exists
    self.label = request.name
    self.nodes = [request.name]
    if request.slices > 1:
      if request.simple:
        raise ConfigError(
          f'slices={request.slices}: only a queued resource has several; '
          'leave out --simple'
        )
      self.nodes = [f'{request.name}-{i}' for i in range(request.slices)]
    self._topology = None
    if request.type:
      self._topology = topology.parse(request.type)
      if ':' in self._topology.alias:
        raise ConfigError(
          f'type={request.type!r}: no type of Cloud TPU has that shape; name '
          'one by its size, such as v5litepod-256 or v4-128'
        )
      if not self._topology.generation.runtime_version:
        raise ConfigError(
          f'type={request.type!r}: the Cloud TPU API does not have it; '
          'docs/cloud.md says how to use GKE or Compute Engine, and --hosts'
        )

  # ---- What there is ---------------------------------------------------------

  def state(self) -> str:
    """READY, or the first state that is something else."""
    if not self._request.simple:
      found = self._describe('queued-resources', self._request.name)
      state = NOT_FOUND if found is None else found['state']['state']
      if state != 'ACTIVE':
        return state
    for node in self.nodes:
      found = self._describe('tpu-vm', node)
      state = NOT_FOUND if found is None else found['state']
      if state != READY:
        return state
    return READY

  def why(self) -> str:
    """What Cloud TPU says of a request that failed; '' if nothing."""
    if self._request.simple:
      return ''
    found = self._describe('queued-resources', self._request.name) or {}
    error = found.get('state', {}).get('failedData', {}).get('error', {})
    return error.get('message', '')

  def workers(self) -> list[Worker]:
    """Of every node, as many as it has addresses.

    Raises:
      CloudError: if a node is gone.
    """
    workers = []
    for node in self.nodes:
      found = self._describe('tpu-vm', node)
      if found is None:
        raise CloudError(f'{node}: there is no such node', retry=True)
      for index in range(len(found.get('networkEndpoints', [1]))):
        workers.append(Worker(f'{node}-worker-{index}', node, index))
    return workers

  def _describe(self, kind: str, name: str) -> dict[str, Any] | None:
    """The resource as gcloud describes it; None if there is none."""
    command = [*self._gcloud(kind, 'describe', name), '--format=json']
    for trial in range(_TRIALS):
      result = self.shell.run(command, self._dry_answer(kind))
      if result.code == 0:
        return json.loads(result.out)
      message = result.err.decode('utf-8', 'replace')
      if 'NOT_FOUND' in message or 'not found' in message:
        return None
      if not _is_transient(result):
        break
      self.shell.sleep(_POLL_SECONDS * (trial + 1))
    raise CloudError(
      f'{name}: cannot be asked for its state: {result.reason}',
      retry=_is_transient(result),
    )

  def _dry_answer(self, kind: str) -> bytes:
    if not self._dry_exists:
      return b'null'
    hosts = self._topology.hosts if self._topology else 1
    state = {'state': 'ACTIVE'} if kind == 'queued-resources' else READY
    answer = {'state': state, 'networkEndpoints': [{}] * hosts}
    return json.dumps(answer).encode()

  # ---- Making and deleting ---------------------------------------------------

  def create(self) -> None:
    """Asks for the slice, and does not wait.

    Raises:
      CloudError: if Cloud TPU refuses.
    """
    result = self.shell.run(self.creation())
    self._dry_exists = True
    if result.code == 0:
      return
    if _QUOTA in result.reason.lower():
      raise CloudError(
        f'{self.label}: the quota does not allow it: {result.reason}; ask for '
        'more of it for this zone and tier, or delete what uses it',
        retry=True,
      )
    raise CloudError(
      f'{self.label}: cannot be created: {result.reason}',
      retry=_is_transient(result),
    )

  def creation(self) -> list[str]:
    """The command that asks for the slice."""
    request = self._request
    if self._topology is None:
      raise ConfigError('missing --type=T, such as v5litepod-256 or v4-128')
    generation = self._topology.generation
    _, _, count = self._topology.alias.partition('-')
    runtime = request.runtime_version or generation.runtime_version
    kind = 'tpu-vm' if request.simple else 'queued-resources'
    version = 'version' if request.simple else 'runtime-version'
    command = [
      *self._gcloud(kind, 'create', request.name),
      f'--accelerator-type={generation.accelerator_type}-{count}',
      f'--{version}={runtime}',
    ]
    if request.slices > 1:
      command += [
        f'--node-count={request.slices}',
        f'--node-prefix={request.name}',
      ]
    elif not request.simple:
      command.append(f'--node-id={request.name}')
    if request.tier != 'on_demand':
      command.append(f'--{request.tier}')
    return [*command, '--async', '--quiet']

  def wait(self) -> None:
    """Returns once every node is ready; prints what it waits for.

    Raises:
      CloudError: if that cannot happen any more.
    """
    last, polls, ticker = '', 0, Ticker()
    while (state := self.state()) != READY:
      # A new resource may not be seen at once.
      if state in _LOST and (state != NOT_FOUND or polls >= _TRIALS):
        why = self.why()
        raise CloudError(
          f'{self.label}: is {state}{why and ": "}{why}', retry=True
        )
      if state != last or ticker.due():
        print(
          f'{self.label}: {state} after {polls * _POLL_SECONDS / 60:.0f} min',
          flush=True,
        )
      last, polls = state, polls + 1
      self.shell.sleep(_POLL_SECONDS)
    print(f'{self.label}: {READY}', flush=True)

  def delete(self) -> None:
    """Deletes the queued resource and its nodes, and sees that they are gone.

    Raises:
      CloudError: if something is left; the message names it.
    """
    for kind, name in self._parts():
      result = Result(0)
      for trial in range(_TRIALS):
        if self._describe(kind, name) is None:
          break
        if trial:
          self.shell.sleep(_POLL_SECONDS)
        result = self.shell.run(self._deletion(kind, name))
        self._dry_exists = False
      else:
        raise CloudError(
          f'{name}: is left, and costs money: {result.reason}; '
          f'{self.how_to_delete()}'
        )

  def how_to_delete(self) -> str:
    """The command for a user, in words."""
    commands = [shlex.join(self._deletion(*part)) for part in self._parts()]
    return 'delete it with: ' + commands[0]

  def _parts(self) -> list[tuple[str, str]]:
    # The nodes of a queued resource go with it, as a rule.
    queued = [('queued-resources', self._request.name)]
    nodes = [('tpu-vm', node) for node in self.nodes]
    return nodes if self._request.simple else queued + nodes

  def _deletion(self, kind: str, name: str) -> list[str]:
    force = ['--force'] if kind == 'queued-resources' else []
    return [*self._gcloud(kind, 'delete', name), *force, '--quiet']

  # ---- Reaching the workers --------------------------------------------------

  def ssh(self, worker: Worker, remote: Sequence[str]) -> list[str]:
    """The command that runs `remote` on `worker`."""
    return [
      *self._gcloud('tpu-vm', 'ssh', worker.node),
      f'--worker={worker.index}',
      *(f'--ssh-flag={option}' for option in _SSH_OPTIONS),
      '--quiet',
      f'--command={shlex.join(remote)}',
    ]

  def copy(
    self, worker: Worker, files: Sequence[str], target: str
  ) -> list[str]:
    """The command that copies `files` to `target` in the home of `worker`."""
    return [
      *self._gcloud('tpu-vm', 'scp', *files, f'{worker.node}:{target}'),
      f'--worker={worker.index}',
      *(f'--scp-flag={option}' for option in _SSH_OPTIONS),
      '--quiet',
    ]

  def _gcloud(self, kind: str, verb: str, *names: str) -> list[str]:
    command = ['gcloud', 'compute', 'tpus', kind, verb, *names]
    if self._request.project:
      command.append(f'--project={self._request.project}')
    return [*command, f'--zone={self._request.zone}']


Machines = Hosts | Slice


def _is_transient(result: Result) -> bool:
  text = result.err.decode('utf-8', 'replace')
  return any(part in text for part in _TRANSIENT)
