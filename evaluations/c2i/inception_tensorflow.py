"""The Inception network of the ADM evaluator as TensorFlow runs it."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")              # its start-up lines would bury the results

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from evaluations.c2i.inception import INPUT, LOGITS, POOL, SPATIAL, SPATIAL_CHANNELS


class TensorFlowInception:
    """Features of pictures by a frozen graph; a FeatureNetwork.

    Args:
        path: the graph.
        sha256: of its file.

    Raises:
        ValueError: the file is no graph, or not one of this network.
    """

    image_size = None                               # any: the graph resizes to 299 pixels
    settings = {"class_names": None}

    def __init__(self, path, sha256):
        self.name, self.sha256 = "Inception 2015-12-05 (tensorflow)", sha256
        definition = tf.compat.v1.GraphDef()
        try:
            with open(path, "rb") as file:
                definition.ParseFromString(file.read())
        except DecodeError as error:
            raise ValueError(f"{path}: expected a frozen TensorFlow graph, found other or damaged content; download it "
                             "again") from error
        if missing := {INPUT, POOL, SPATIAL, LOGITS} - {node.name for node in definition.node}:
            raise ValueError(f"{path}: expected nodes {INPUT}, {POOL}, {SPATIAL} and {LOGITS}, found no "
                             f"{', '.join(sorted(missing))}; this is not the graph of the ADM evaluator")
        graph = tf.Graph()
        with graph.as_default():
            self._images = tf.compat.v1.placeholder(tf.float32, (None, None, None, 3))
            outputs = tf.import_graph_def(definition, {f"{INPUT}:0": self._images},
                                          [f"{POOL}:0", f"{SPATIAL}:0", LOGITS], name="")
            self._outputs, weight = outputs[:2], outputs[2].inputs[1]
            self._session = tf.compat.v1.Session(graph=graph)
            self._softmax_weight = self._session.run(weight)                        # (2048, 1008)

    def features(self, images):
        """Computes pool, spatial and probabilities of pictures (N, P, P, 3) uint8; see FeatureNetwork."""
        pool, spatial = self._session.run(self._outputs, {self._images: images.astype(np.float32)})
        pool = pool.reshape(len(images), -1)                                        # (N, 2048)
        logits = pool @ self._softmax_weight                                        # without the bias, as ADM
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (pool, spatial[..., :SPATIAL_CHANNELS].reshape(len(images), -1),     # (N, 17 * 17 * 7)
                weights / weights.sum(axis=1, keepdims=True))
