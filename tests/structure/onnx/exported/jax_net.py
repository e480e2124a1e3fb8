"""Made jax_net.onnx and jax_net.npz with jax 0.10.2, flax 0.12.8 and jax2onnx 0.17.1: python jax_net.py"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax2onnx import to_onnx

HERE = Path(__file__).parent


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.back = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.embed = nnx.Linear(8, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.up = nnx.Linear(12, 20, rngs=rngs)
        self.down = nnx.Linear(20, 12, rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.stem(x))
        x = x + jax.nn.gelu(self.back(x))
        x = self.embed(x.mean(axis=(1, 2)))
        x = x + self.down(jax.nn.silu(self.up(self.norm(x))))
        return jax.nn.softmax(self.head(x))


net = Net(nnx.Rngs(0))
images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
np.savez(HERE / "jax_net.npz", images=images, outputs=np.asarray(net(jnp.asarray(images))))
to_onnx(net, [("B", 8, 8, 3)], model_name="net", return_mode="file", output_path=str(HERE / "jax_net.onnx"))
