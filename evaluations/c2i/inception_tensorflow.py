"""The Inception network of the ADM evaluator as TensorFlow runs it."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")      # its start-up lines would bury the results

from pathlib import Path

import numpy as np
import tensorflow as tf
from scipy.special import softmax

from evaluations.c2i.features import SPATIAL_CHANNELS, Features
from evaluations.c2i.inception import INPUT, LOGITS, POOL, SPATIAL, Inception


class TensorFlowInception(Inception):
    """Features of pictures by a frozen graph; a FeatureNetwork.

    Raises:
        ValueError: the graph is not that of this network.
        DecodeError: of protobuf: the file is no graph.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens the graph at `path`."""
        definition = tf.compat.v1.GraphDef.FromString(Path(path).read_bytes())
        super().__init__(path, "tensorflow", [node.name for node in definition.node])
        graph = tf.Graph()
        with graph.as_default():
            self._images = tf.compat.v1.placeholder(tf.float32, (None, None, None, 3))
            *self._outputs, logits = tf.import_graph_def(
                definition, input_map={f"{INPUT}:0": self._images},
                return_elements=[f"{POOL}:0", f"{SPATIAL}:0", LOGITS], name="")
            self._session = tf.compat.v1.Session(graph=graph)
            self._softmax_weight = self._session.run(logits.inputs[1])              # (2048, 1008)

    def features(self, images: np.ndarray) -> Features:
        """Returns the features of pictures (N, P, P, 3) uint8."""
        feed = {self._images: images.astype(np.float32)}
        pool, spatial = self._session.run(self._outputs, feed)
        pool = pool.reshape(len(images), -1)                                    # (N, 2048)
        spatial = spatial[..., :SPATIAL_CHANNELS].reshape(len(images), -1)      # (N, 17 * 17 * 7)
        probabilities = softmax(pool @ self._softmax_weight, axis=1)    # without the bias, as ADM
        return Features(pool, spatial, probabilities)
