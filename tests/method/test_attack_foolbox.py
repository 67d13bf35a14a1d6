"""Attacks on a small network give what those of foolbox give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attack import attack_of, delta_of

K, SHAPE = 5, (6, 6, 3)


def small_net_weights():
  rng = np.random.default_rng(0)
  return {
    'conv1': rng.normal(0, 0.4, (3, 3, 3, 8)),
    'conv2': rng.normal(0, 0.3, (3, 3, 8, 8)),
    'head': rng.normal(0, 0.3, (8 * 36, K)),
  }


def jax_net(weights, x_NHWC):
  """Two convolutions with a smooth activation, and a dense layer."""
  conv = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  y = jnp.tanh(conv(x_NHWC, weights['conv1']))
  y = jnp.tanh(conv(y, weights['conv2']))
  return y.reshape(len(y), -1) @ weights['head']


def torch_net(torch, weights):
  weights = {k: torch.tensor(v) for k, v in weights.items()}
  conv = torch.nn.functional.conv2d

  class Net(torch.nn.Module):
    def forward(self, x_NCHW):
      y = x_NCHW
      for name in ('conv1', 'conv2'):
        kernel = weights[name].permute(3, 2, 0, 1)
        y = torch.tanh(conv(y, kernel, padding=1))
      y = y.permute(0, 2, 3, 1).reshape(len(y), -1)  # as NHWC
      return y @ weights['head']

  return Net().eval()


def foolbox_delta(name, epsilon, step_size, steps, image, labels, targeted):
  """The perturbation of Foolbox in units of 1, [N, H, W, C]."""
  foolbox = pytest.importorskip('foolbox')
  torch = pytest.importorskip('torch')
  model = foolbox.PyTorchModel(
    torch_net(torch, small_net_weights()), bounds=(0, 1), device='cpu'
  )
  x = torch.tensor(image.transpose(0, 3, 1, 2) / 255)
  if name == 'fgsm':
    attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
  else:
    kind = {'linf': 'LinfPGD', 'l2': 'L2PGD'}[name]
    attack = getattr(foolbox.attacks, kind)(
      abs_stepsize=step_size, steps=steps, random_start=False
    )
  criterion = (
    foolbox.criteria.TargetedMisclassification
    if targeted
    else foolbox.criteria.Misclassification
  )
  adv = attack.run(model, x, criterion(torch.tensor(labels)), epsilon=epsilon)
  return (adv - x).numpy().transpose(0, 2, 3, 1)


@pytest.mark.parity
@pytest.mark.parametrize(
  'name, epsilon, step_size, steps, targeted',
  [
    ('fgsm', 8.0, 8.0, 1, False),  # Foolbox has no targeted FGSM
    ('linf', 8.0, 3.0, 6, False),
    ('linf', 8.0, 3.0, 6, True),
    ('l2', 100.0, 30.0, 6, False),
    ('l2', 100.0, 30.0, 6, True),
  ],
)
def test_attacks_agree_with_foolbox(name, epsilon, step_size, steps, targeted):
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    image = np.clip(rng.normal(128, 100, (8, *SHAPE)), 0, 255).round()
    labels = rng.integers(0, K, 8)
    expected = 255 * foolbox_delta(
      name,
      epsilon / 255,
      step_size / 255,
      steps,
      image,
      labels,
      targeted,
    )
    weights = small_net_weights()

    def loss_fn(pixels, labels):
      log_p = jax.nn.log_softmax(jax_net(weights, pixels[0] / 255))
      return -jnp.take_along_axis(log_p, labels[0][:, None], 1).sum(), None

    attack = attack_of(
      norm='l2' if name == 'l2' else 'linf',
      epsilon=epsilon,
      step_size=step_size,
      steps=steps,
      targeted=targeted,
    )
    delta = delta_of(
      attack, loss_fn, jnp.asarray(image)[None], jnp.asarray(labels)[None]
    )
  # Both run in float64, so that no sign of a gradient near zero differs, and
  # only rounding is left, of pixels of up to 255.
  np.testing.assert_allclose(delta[0], expected, atol=1e-9)
  assert np.abs(expected).max() > 1
