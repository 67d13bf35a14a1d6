"""Input pipeline; the only package that may import tensorflow.

`datasets` and `sampler` import without it. The order of examples and their
augmentation are functions of (seed, step, example id), so nothing is saved and
a run resumes at any step, on any number of hosts, with the same images.
"""

import os

# TensorFlow's start-up messages say nothing that a run needs. JAX sets 1.
if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'
