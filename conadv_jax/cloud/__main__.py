"""Rent TPU slices, set them up, train on them, and leave nothing behind.

  python -m conadv_jax.cloud COMMAND --name=NAME --zone=ZONE [flags] [-- ...]

  create      asks for a slice and waits until it is ready
  setup       installs this checkout, at a commit, on every worker
  run         starts the command after `--` on every worker, shows the log of
              the first, gathers all, and exits as they do; Ctrl-C and a lost
              connection leave it running
  status      of the slice and of the job on every worker
  logs        the end of a job's log; --follow: until the job ends
  stop        asks a job to save and end, as a signal does
  supervise   all of it: creates, sets up and runs; after a preemption, or exit
              code 42, waits and resumes; deletes what it made at the end
  delete      deletes the slice, and checks that it is gone

  --type=T             slice: v5litepod-256, v4-128, ... (create, supervise)
  --tier=spot          or reserved, on_demand (the default)
  --slices=N           slices, joined by the data centre network
  --simple             a TPU VM without a queued resource
  --project=P          instead of gcloud's own
  --hosts=A,B          machines that exist, by ssh, instead of --name and --zone
  --commit=HEAD        what is installed (setup, supervise)
  --device=tpu         or cuda, cpu: which JAX is installed
  --job=train          name of a job; --logs=DIR: where its logs are gathered
  --tries=5            ends in a row, each within 10 minutes, before supervise
                       gives up; --keep: it deletes nothing; --adopt: it takes
                       over a slice that exists
  --dry_run            prints every command, and runs none

docs/cloud.md has the commands in order.
"""

from conadv_jax.base.usage import answered


def console() -> None:
  """Runs the command `conadv-cloud`."""
  if not answered(__doc__):
    import sys

    from conadv_jax.cloud import command

    sys.exit(command.main(sys.argv[1:]))


if __name__ == '__main__':
  console()
