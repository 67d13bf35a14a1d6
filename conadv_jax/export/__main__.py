"""Write the network of a run to a file for other programs, with a model card.

  python -m conadv_jax.export --workdir=DIR --output=FILE.safetensors
                              [--format=safetensors|stablehlo]
                              [--config.eval.FIELD=VALUE ...]

Takes the newest checkpoint: the batch-norm row `eval.route`, and the averaged
weights if `eval.use_ema`. Beside the file it writes FILE.json and FILE.md, a
model card: what the network is, how accurate it was measured to be, and how to
load it.

  safetensors   weights. A network that timm has gets timm's names and layouts,
                and timm.create_model loads it; any other keeps ours
  stablehlo     FILE.stablehlo, a function of uint8 images that includes the
                weights: jax.export loads it on CPUs, GPUs and TPUs
"""

from conadv_jax.base.usage import answered


def console() -> None:
  """Runs the command `conadv-export`."""
  if not answered(__doc__):
    from conadv_jax import cli
    from conadv_jax.export import export

    cli.run(export.export)


if __name__ == '__main__':
  console()
