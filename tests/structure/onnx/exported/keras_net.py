"""Made keras_net.onnx and keras_net.npz with keras 3.15.1, tensorflow-cpu 2.21.0 and tf2onnx: python keras_net.py"""

from pathlib import Path

import keras
import numpy as np

HERE = Path(__file__).parent
layers = keras.layers

keras.utils.set_random_seed(0)
image = keras.Input((8, 8, 3), name="image")
x = layers.Conv2D(8, 3, padding="same", name="stem")(image)
x = layers.BatchNormalization()(x)
skip = x = layers.ReLU()(x)
x = layers.DepthwiseConv2D(3, padding="same", name="depth")(x)
x = layers.Conv2D(12, 1, name="point")(x)
x = layers.Activation("swish")(x)
x = layers.Conv2D(8, 3, padding="same", name="back")(x)
x = layers.MaxPool2D()(layers.Add()([x, skip]))
x = layers.Dense(10, activation="relu", name="hidden")(layers.Flatten()(x))
net = keras.Model(image, layers.Dense(4, activation="softmax", name="out")(x), name="net")

images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype("float32")
np.savez(HERE / "keras_net.npz", images=images, outputs=net(images).numpy())
net.export(HERE / "keras_net.onnx", format="onnx", verbose=False)
