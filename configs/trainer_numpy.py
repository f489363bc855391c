#!/usr/bin/env python3
"""A trainer for rodizio in another language: softmax regression with numpy alone.

    rodizio run --trainer 'python3 configs/trainer_numpy.py DATA.csv'

DATA.csv (or .csv.gz) has no header; each line is an example: numbers, then its class, a whole number from 0.
rodizio asks one JSON object a line on standard input and reads one a line from standard output.
What is for people goes to standard error.
"""

import json
import sys

import numpy as np


def read_weights(path):
    """A safetensors file: the length of a JSON header, the header, the values of its tensors."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    tensors = {}
    for name, info in header.items():
        if name != "__metadata__":
            start, end = info["data_offsets"]
            tensors[name] = np.frombuffer(data[start:end], "<f4").reshape(info["shape"]).copy()
    return tensors


def write_weights(path, tensors):
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.size
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4").tobytes())


def probabilities(weights, x):
    logits = x @ weights["weight"].T + weights["bias"]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def measure(weights, x, y):
    p = probabilities(weights, x)
    loss = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean()
    return {"num_examples": len(y), "loss": float(loss), "accuracy": float((p.argmax(axis=1) == y).mean())}


class Trainer:
    def __init__(self, path):
        table = np.loadtxt(path, delimiter=",", ndmin=2)
        self.x, self.y = table[:, :-1] / max(np.abs(table[:, :-1]).max(), 1e-12), table[:, -1].astype(int)

    def start(self, ask):
        """Takes this peer's part, holds a fifth out, and makes the weights that all peers start from."""
        classes = self.y.max() + 1
        order = np.random.default_rng(ask["seed"]).permutation(len(self.y))
        if ask["part"]:
            index, of = ask["part"]
            order = order[index - 1 :: of]
        cut = len(order) // 5
        held_out, train = order[:cut], order[cut:]
        self.held_out = self.x[held_out], self.y[held_out]
        self.train_data = self.x[train], self.y[train]
        zeros = {"weight": np.zeros((classes, self.x.shape[1]), "<f4"), "bias": np.zeros(classes, "<f4")}
        write_weights(ask["model"], zeros)
        return {"num_examples": len(train)}

    def evaluate(self, ask):
        return measure(read_weights(ask["model"]), *self.held_out)

    def train(self, ask):
        weights, (x, y) = read_weights(ask["model"]), self.train_data
        random = np.random.default_rng([ask["seed"], ask["round"]])
        for epoch in range(ask["local_epochs"]):
            order = random.permutation(len(y))
            for start in range(0, len(order), ask["batch_size"]):
                batch = order[start : start + ask["batch_size"]]
                error = probabilities(weights, x[batch])
                error[np.arange(len(batch)), y[batch]] -= 1
                step = ask["learning_rate"] / len(batch)
                weights["weight"] -= step * (error.T @ x[batch])
                weights["bias"] -= step * error.sum(axis=0)
            print(json.dumps({"done": epoch + 1, "total": ask["local_epochs"]}), flush=True)
        write_weights(ask["update"], weights)
        return measure(weights, x, y)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    trainer = Trainer(sys.argv[1])
    for line in sys.stdin:
        ask = json.loads(line)
        answer = getattr(trainer, {"start": "start", "evaluate": "evaluate", "train": "train"}[ask["task"]])(ask)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
