"""Check on every host that a run can start there; train nothing.

  python -m conadv_jax.preflight --config=configs/NAME.py[:k=v,...]
    --workdir=DIR [--config.FIELD=VALUE ...] [--step_seconds=S]

Of several hosts, each runs this command, as it does conadv_jax.train. Prints a
line for each check: devices, data set, speed of the input, work directory, the
run that is in it, clocks, disk, memory. All are made, also when one fails. It
takes under a minute once the hosts have met, for which it waits 30 s
(--start_timeout_seconds).

  --step_seconds=S  what a step takes, as conadv_jax.audit or an earlier run
                    says; without it, twice the time of its FLOPs at the peak of
                    the devices, where that is known

Exits with 0, or with 2 if a check failed; with 8 if a host does not answer.
"""

from conadv_jax.base.usage import answered


def console() -> None:
  """Runs the command `conadv-preflight`."""
  if not answered(__doc__):
    from conadv_jax import cli
    from conadv_jax.preflight import command

    cli.run(command.preflight)


if __name__ == '__main__':
  console()
