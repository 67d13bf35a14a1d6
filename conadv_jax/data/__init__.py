"""Input pipeline; the only package that may import tensorflow.

`datasets` and `sampler` import without it. The order of examples and their
augmentation are functions of (seed, step, example id), so nothing is saved and
a run resumes at any step, on any number of hosts, with the same images.
"""

import os

# An image that cannot be decoded is an error inside of TensorFlow, which warns
# of it on stderr ("Local rendezvous is aborting"). We report it, with its file.
# 1 is what JAX sets; with 2, errors are shown and warnings are not.
if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '2'

# Half of the time that importing TensorFlow takes is Keras, which nothing here
# uses. With this, TensorFlow does not import it before it is asked for.
os.environ.setdefault('TF_USE_LEGACY_KERAS', '1')
