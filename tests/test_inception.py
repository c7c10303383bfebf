"""Inception by TensorFlow and by PyTorch, on a stand-in of random weights in the real shapes."""

import http.server
import importlib.util
import json
import sys
import threading

import numpy as np
import pytest
import torch

from autoregressive.runtime.files import file_sha256
from evaluations.c2i import inception
from evaluations.c2i.graph_def import read_graph
from evaluations.c2i.inception import open_inception
from evaluations.c2i.inception_torch import OPERATIONS, TorchInception
from processes import run_here
from scripts.benchmarks.inception_stand_in import build_inception

EVALUATOR = "evaluations/c2i/evaluator.py"


@pytest.fixture(scope="module")
def tf():
    """TensorFlow; without it, what is compared with it is skipped."""
    # Before TensorFlow: loaded after it, triton's library crashes the process.
    import torch._dynamo  # noqa: F401

    return pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def graph_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "graph.pb"
    path.write_bytes(build_inception().SerializeToString())
    return path


@pytest.fixture(scope="module")
def networks(graph_path, tf):
    return {backend: open_inception(graph_path, backend, torch.device("cpu"))
            for backend in ("tensorflow", "torch")}


def pictures(count, size, seed=0):
    small = np.random.default_rng(seed).integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
    factor = -(-size // 8)
    large = small.repeat(factor, axis=1).repeat(factor, axis=2)
    return np.ascontiguousarray(large[:, :size, :size])


@pytest.mark.parametrize("size", [64, 256, 299, 320])
def test_both_backends_agree_on_every_output(networks, size):
    images = pictures(2, size)
    expected, found = (networks[backend].features(images) for backend in ("tensorflow", "torch"))
    assert [array.shape for array in found] == [(2, 2048), (2, 17 * 17 * 7), (2, 1008)]
    for reference, other in zip(expected, found, strict=True):
        assert reference.dtype == other.dtype == np.float32
        assert np.abs(reference - other).max() < 1e-3 * np.abs(reference).max()
        assert np.linalg.norm(reference - other) < 1e-3 * np.linalg.norm(reference)
    assert np.allclose(found[2].sum(axis=1), 1, atol=1e-5)
    assert np.abs(found[0][0] - found[0][1]).max() > 0.01


@pytest.mark.parametrize("value", [0, 255])
def test_both_backends_agree_on_one_even_picture(networks, value):
    images = np.full((1, 32, 32, 3), value, np.uint8)
    by_tensorflow = networks["tensorflow"].features(images)
    by_torch = networks["torch"].features(images)
    for expected, found in zip(by_tensorflow, by_torch, strict=True):
        assert np.isfinite(found).all()
        assert np.abs(expected - found).max() <= 1e-3 * np.abs(expected).max()


def test_no_layer_waits_for_the_device_to_know_what_to_do(graph_path):
    # Tensors of the meta device have no values to wait for.
    network = TorchInception(graph_path, torch.device("meta"))
    pool, spatial, _ = network.run(torch.zeros(2, 3, 64, 64, device="meta"))
    assert pool.shape[:2] == (2, 2048) and spatial.shape[2:] == (17, 17)


def test_probabilities_leave_out_the_bias(graph_path):
    nodes = read_graph(graph_path)
    weight, bias = (nodes[f"softmax/{name}"].attributes["value"] for name in ("weights", "biases"))
    network = TorchInception(graph_path, torch.device("cpu"))
    pool, _, probabilities = network.features(pictures(1, 64))
    logits = pool @ weight
    without = np.exp(logits - logits.max())
    with_bias = np.exp(logits + bias - (logits + bias).max())
    assert np.allclose(probabilities, without / without.sum(), atol=1e-6)
    assert not np.allclose(probabilities, with_bias / with_bias.sum(), atol=1e-3)


def test_reader_finds_what_tensorflow_wrote(graph_path, tf):
    definition = build_inception()
    nodes = read_graph(graph_path)
    assert list(nodes) == [node.name for node in definition.node]
    for node in definition.node:
        found = nodes[node.name]
        inputs = [name for name in node.input if not name.startswith("^")]
        assert found.op == node.op and found.inputs == inputs
        if node.op == "Const":
            value = tf.make_ndarray(node.attr["value"].tensor)
            assert np.array_equal(found.attributes["value"], value)
        if node.op in ("Conv2D", "MaxPool", "AvgPool"):
            assert found.attributes["strides"] == list(node.attr["strides"].list.i)
            assert found.attributes["padding"] == node.attr["padding"].s


@pytest.mark.parametrize("values, shape", [
    (7.5, (3, 2)),
    ([1, -2, 3], None),
    (np.arange(6, dtype=np.int64).reshape(2, 3), None),
])
def test_reader_understands_all_ways_to_write_a_constant(tmp_path, tf, values, shape):
    tensor = tf.make_tensor_proto(values, shape=shape)
    definition = tf.compat.v1.GraphDef()
    node = definition.node.add(name="c", op="Const")
    node.attr["value"].tensor.CopyFrom(tensor)
    (tmp_path / "c.pb").write_bytes(definition.SerializeToString())
    found = read_graph(tmp_path / "c.pb")["c"].attributes["value"]
    expected = tf.make_ndarray(tensor)
    assert np.array_equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_operations_are_tensorflows_at_every_border(tf, stride, size, padding):
    x = np.random.default_rng(0).standard_normal((2, size, size + 2, 3)).astype(np.float32)
    weight = np.random.default_rng(1).standard_normal((3, 2, 3, 4)).astype(np.float32)
    attributes = {"strides": [1, stride, stride, 1], "ksize": [1, 3, 3, 1],
                  "padding": padding.encode()}
    ours = torch.from_numpy(x).permute(0, 3, 1, 2)
    pairs = [
        (tf.nn.conv2d(x, weight, stride, padding),
         OPERATIONS["Conv2D"](attributes, ours, torch.from_numpy(weight))),
        (tf.nn.max_pool2d(x, 3, stride, padding), OPERATIONS["MaxPool"](attributes, ours)),
        (tf.nn.avg_pool2d(x, 3, stride, padding), OPERATIONS["AvgPool"](attributes, ours)),
    ]
    for expected, found in pairs:
        assert np.allclose(expected, found.permute(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_batch_norm_uses_gamma_only_where_the_graph_says_so(scaled):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 5, 4, 3))
    parameters = random.random((4, 3)) + 0.1
    mean, variance, beta, gamma = parameters
    expected = (x - mean) / np.sqrt(variance + 0.01) * (gamma if scaled else 1) + beta
    attributes = {"variance_epsilon": 0.01, "scale_after_normalization": scaled}
    batch_norm = OPERATIONS["BatchNormWithGlobalNormalization"]
    found = batch_norm(attributes, torch.from_numpy(x).permute(0, 3, 1, 2),
                       *torch.from_numpy(parameters))
    assert np.allclose(expected, found.permute(0, 2, 3, 1))


@pytest.mark.long
def test_evaluator_prints_the_same_numbers_with_both_backends(
        graph_path, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    np.savez("ref.npz", arr_0=pictures(12, 32, 1))
    np.savez("samples.npz", arr_0=pictures(10, 32, 2), labels=np.arange(10))
    numbers = []
    for backend in ("torch", "tensorflow"):
        if backend == "tensorflow":
            request.getfixturevalue("tf")
        code = run_here(EVALUATOR, "ref.npz", "samples.npz", "--backend", backend,
                        "--inception-path", graph_path, "--batch-size", 5)
        lines = capsys.readouterr().out.splitlines()
        titles = [line.split(":")[0] for line in lines]
        assert code == 0
        assert titles == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
        record = json.loads((tmp_path / "samples.json").read_text())
        assert record["feature_network"] == {"name": f"Inception 2015-12-05 ({backend})",
                                             "sha256": file_sha256(graph_path)}
        numbers.append([float(line.split(": ")[1]) for line in lines])
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
@pytest.mark.parametrize("content", [b"not a graph", b"", None])
def test_other_files_are_a_clear_error(graph_path, tmp_path, backend, content, request):
    if backend == "tensorflow":
        request.getfixturevalue("tf")
    path = tmp_path / "other.pb"
    path.write_bytes(graph_path.read_bytes()[:100000] if content is None else content)
    with pytest.raises(ValueError, match="other.pb: expected"):
        open_inception(path, backend, torch.device("cpu"))


def test_torch_backend_needs_no_tensorflow(graph_path, monkeypatch):
    find_spec = importlib.util.find_spec
    missing = "tensorflow"

    def find_all_but_missing(name):
        return None if name == missing else find_spec(name)

    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setattr("importlib.util.find_spec", find_all_but_missing)
    network = open_inception(graph_path, "torch", torch.device("cpu"))
    assert network.features(pictures(1, 32))[0].shape == (1, 2048)
    message = "expected the package tensorflow, found none; .*choose another --backend"
    with pytest.raises(ValueError, match=message):
        open_inception(graph_path, "tensorflow", torch.device("cpu"))
    missing = "tensorboard"                                      # by which torch reads the graph
    message = "--backend torch: expected the package tensorboard, found none"
    with pytest.raises(ValueError, match=message):
        open_inception(graph_path, "torch", torch.device("cpu"))


@pytest.fixture
def server(tmp_path):
    """A web server of one folder; gives (its address, the folder)."""
    (tmp_path / "web").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path / "web")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", tmp_path / "web"
        found.shutdown()


def test_download_is_checked_and_whole_or_not_there(server, tmp_path, monkeypatch):
    address, web = server
    (web / "file.bin").write_bytes(bytes(range(256)) * 9000)
    good = file_sha256(web / "file.bin")
    monkeypatch.setattr(inception, "INCEPTION_URL", f"{address}/file.bin")
    monkeypatch.setattr(inception, "INCEPTION_SHA256", good)
    inception.download_inception(tmp_path / "new" / "file.bin")
    assert file_sha256(tmp_path / "new" / "file.bin") == good
    for name, sha256, words in (("file.bin", "0" * 64, f'expected "{"0" * 64}", got "{good}"'),
                                ("none.bin", good, "HTTP Error 404")):
        monkeypatch.setattr(inception, "INCEPTION_URL", f"{address}/{name}")
        monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256)
        message = (f"{name}: could not be downloaded .*{words}.*"
                   f"get it from .*/{name} and put it there .SHA-256 {sha256}")
        with pytest.raises(ValueError, match=message):
            inception.download_inception(tmp_path / "bad" / name)
        assert not list((tmp_path / "bad").glob("*"))
