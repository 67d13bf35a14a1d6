"""Compile the training step of a configuration for a TPU slice, without one.

  python -m conadv_jax.audit --config=configs/NAME.py[:k=v,...]
    --topology=v3-1024 [--config.FIELD=VALUE ...]

  --topology=T[,T...]  v3:16x32 (chips), or a type such as v3-1024, v5e-256
  --slices=N           of that topology each, joined by the data centre network
  --json=FILE          the report as JSON
  --output=DIR         JSON, Markdown, HTML and plots, named by what is audited,
                       and the compiled programs, so that a rerun compiles only
                       what is new; never replaces a report of something else
  --compare            adds the cost of staleness, views, accumulation and remat
  --sweep              finds the least accumulation that fits, for each slice of
                       --topology and batch of --batch_sizes=B[,B...]
  --scaling            predicts step times on 8 to 4,096 devices

Needs libtpu: pip install -e '.[tpu]'. Exits with 3 if the step does not fit,
2 for a wrong setting.
"""

from conadv_jax.base.usage import answered


def console() -> None:
  """Runs the command `conadv-audit`."""
  if not answered(__doc__):
    from conadv_jax import cli
    from conadv_jax.audit import command

    cli.run(command.audit)


if __name__ == '__main__':
  console()
