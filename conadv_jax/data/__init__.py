"""Input pipeline; the only package that may import tensorflow.

`datasets` and `sampler` import without it. The order of examples and their
augmentation are functions of (seed, step, example id), so nothing is saved and
a run resumes at any step, on any number of hosts, with the same images.
"""
