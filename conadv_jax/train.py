"""Train one configuration.

  python -m conadv_jax.train --config=configs/NAME.py[:k=v,...] --workdir=DIR
                             [--config.FIELD=VALUE ...]

Of several hosts, each runs this command. JAX finds them on Cloud TPU VMs, GKE,
Slurm and Open MPI; elsewhere add --coordinator=HOST:PORT of host 0,
--num_hosts=N and --host_index=I, from 0. The work directory must be shared.

The work directory gets config.json, metrics.jsonl, TensorBoard events,
checkpoints/, plots/ and, at the end, summary.json. Run the same command again
to resume. Ctrl-C or SIGTERM saves a checkpoint and exits with 42. Other codes:
2 is a wrong setting, 4 a loss that stopped being finite, 6 a hang, 7 a failure
of storage, 8 a lost host.

  --list         prints the recipes, by whose names --config may call them
  --supervise    starts the run again after 42, 6 and 8 (conadv_jax.supervise)
  --profile      prints the time from here to the first step, by its parts
  --replay=STEP  repeats a step of the run in DIR, without --config, and shows
                 what was wrong in it (conadv_jax.debug.replay)
"""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from conadv_jax.base.usage import answered
from conadv_jax.run.timeline import Timeline

if TYPE_CHECKING:
  from conadv_jax.config import Config

PROFILE = '--profile'


def train(config: Config, directory: str) -> dict[str, Any]:
  """Trains `config` in the work directory; see `conadv_jax.run.training`."""
  from conadv_jax.run import training

  return training.train(config, directory)


def main(argv: Sequence[str], timeline: Timeline | None = None) -> None:
  """The command, which began with `timeline`."""
  if '--supervise' in argv:
    command = [sys.executable, '-m', 'conadv_jax.supervise', *argv[1:]]
    os.execv(sys.executable, command)
  if any(argument.startswith('--replay') for argument in argv):
    from conadv_jax.debug import replay

    replay.main(argv)
    return
  if '--list' in argv:
    from conadv_jax.config import recipes

    print(recipes.listed())
    return
  from conadv_jax import cli
  from conadv_jax.config import from_config_dict
  from conadv_jax.hosts.stop import NOTHING_TO_SAVE, StopRequest

  with StopRequest() as stop_request:
    stop_request.leave_at_once(NOTHING_TO_SAVE)
    argv = [argument for argument in argv if argument != PROFILE]
    values, directory = cli.parse_config_file(cli.start_hosts(argv))
    config = from_config_dict(values)
    from conadv_jax.run import training  # after what may be a wrong setting

    training.train(config, directory, stop_request, timeline)


def console() -> None:
  """Runs the command `conadv-train`."""
  if not answered(__doc__):
    # Until the steps begin: what is imported and traced is no garbage, and to
    # look through it again and again takes a fifth of the time.
    gc.disable()
    timeline = Timeline(wanted=PROFILE in sys.argv)
    command = functools.partial(main, timeline=timeline)
    from conadv_jax import cli

    cli.run(command)


if __name__ == '__main__':
  console()
