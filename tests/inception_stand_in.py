"""The stand-in of Inception beside TensorFlow, which runs it, too."""

import torch._dynamo  # noqa: F401 - before TensorFlow: loaded after it, triton's library crashes the process

from scripts.benchmarks.inception_stand_in import build_inception  # noqa: F401

import tensorflow as tf  # noqa: F401 isort: skip
