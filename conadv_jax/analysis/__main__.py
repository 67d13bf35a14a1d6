"""Measure a run: curvature, sharpness, landscape, staleness, gradient noise.

  python -m conadv_jax.analysis --workdir=DIR [--what=curvature,sharpness,...]
                                [--config.eval.FIELD=VALUE ...]

  curvature  largest eigenvalues of the Hessian, and its trace
  sharpness  how far the loss can rise near the weights, adaptive and plain
  landscape  loss and accuracy on a line and a plane around the weights
  staleness  what perturbations by older weights are worth, along the run
  noise      gradient noise scale, of a run with --config.noise_scale=True

The first three are of the newest checkpoint. Each writes NAME.json and NAME.png
to DIR/analysis and prints a table; what is there already is not computed again.
docs/analysis.md has the formulas.

  --what=all             the default: all that the run has the data for
  --output=DIR           instead of analysis/ in the work directory
  --examples=2000        in the form of an evaluation
  --split=train          that they are taken from, or eval
  --seed=0               of examples, start vectors, probes and directions
  --eigenvalues=5        curvature: how many
  --probes=100           curvature: random vectors for the trace
  --rho=0.05,0.1         sharpness: radii
  --rho_adaptive=0.1,0.5 sharpness: radii relative to each weight
  --ascent_steps=20      sharpness: gradients for each radius
  --span=1               landscape: from -span to span
  --points=41            landscape: on the line
  --grid=15              landscape: on each side of the plane
  --at=STEP,...          staleness: steps, instead of 16 after each checkpoint

With batch norm, compare networks by the adaptive sharpness alone: curvature,
plain sharpness and the norm of the weights change when weights are rescaled,
which leaves the network the same.
"""

from conadv_jax.base.usage import answered


def console() -> None:
  """Runs the command `conadv-analyse`."""
  if not answered(__doc__):
    from conadv_jax import cli
    from conadv_jax.analysis import command

    cli.run(command.analyse)


if __name__ == '__main__':
  console()
