"""The models of rodizio as PyTorch has them.

    speed JSON   prints how many examples a second PyTorch trains on one thread
    check DIR    loads the weights that a test has written, and compares outputs and gradients

A model is described by one JSON object: model, shape (of one example), outputs, hidden, channels, norm, embedding_dim.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        widths = [inputs, *hidden, outputs]
        self.count = len(widths) - 1
        for index in range(self.count):
            setattr(self, f"fc{index + 1}", nn.Linear(widths[index], widths[index + 1]))

    def forward(self, x):
        x = x.flatten(1)
        for index in range(self.count):
            x = getattr(self, f"fc{index + 1}")(x)
            x = F.relu(x) if index + 1 < self.count else x
        return x


class LinearModel(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Cnn(Mlp):
    def __init__(self, shape, kernel, channels, hidden, outputs):
        inputs, height, width = shape
        features = channels[-1] * (height >> len(channels)) * (width >> len(channels))
        super().__init__(features, hidden, outputs)
        self.stages = len(channels)
        for index, count in enumerate(channels):
            setattr(self, f"conv{index + 1}", nn.Conv2d(inputs, count, kernel, padding=kernel // 2))
            inputs = count

    def forward(self, x):
        for index in range(self.stages):
            x = F.max_pool2d(F.relu(getattr(self, f"conv{index + 1}")(x)), 2)
        return super().forward(x)


def norm_layer(kind, channels):
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    groups = next(g for g in range(max(1, min(8, channels // 2)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm_layer(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm_layer(norm, outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_layer(norm, outputs))

    def forward(self, x):
        beside = self.downsample(x) if self.downsample else x
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + beside)


class Resnet(nn.Module):
    def __init__(self, shape, channels, norm, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], channels[0], 3, 1, 1, bias=False)
        self.bn1 = norm_layer(norm, channels[0])
        self.stages = len(channels)
        inputs = channels[0]
        for index, width in enumerate(channels):
            stride = 2 if index else 1
            blocks = nn.Sequential(Block(inputs, width, stride, norm), Block(width, width, 1, norm))
            setattr(self, f"layer{index + 1}", blocks)
            inputs = width
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for index in range(self.stages):
            x = getattr(self, f"layer{index + 1}")(x)
        return self.fc(x.mean((2, 3)))


class CharLstm(nn.Module):
    def __init__(self, tokens, dim, hidden):
        super().__init__()
        self.embedding = nn.Embedding(tokens, dim)
        self.lstm = nn.LSTM(dim, hidden[0], num_layers=len(hidden), batch_first=True)
        self.fc = nn.Linear(hidden[0], tokens)

    def forward(self, x):
        x, _ = self.lstm(self.embedding(x.long()))
        return self.fc(x).flatten(0, 1)


def build(spec):
    model, shape, outputs = spec["model"], spec["shape"], spec["outputs"]
    inputs = 1
    for size in shape:
        inputs *= size
    if model == "linear":
        return LinearModel(inputs, outputs)
    if model == "mlp":
        return Mlp(inputs, spec["hidden"], outputs)
    if model == "cnn":
        return Cnn(shape, 3, spec["channels"], spec["hidden"], outputs)
    if model == "fedavg-cnn":
        return Cnn(shape, 5, [32, 64], [512], outputs)
    if model == "resnet-small":
        return Resnet(shape, spec["channels"], spec["norm"], outputs)
    return CharLstm(outputs, spec["embedding_dim"], spec["hidden"])


def speed(spec):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, shape, outputs, batch = build(spec), spec["shape"], spec["outputs"], spec["batch_size"]
    rows = shape[0] if spec["model"] == "char-lstm" else 1
    if rows > 1:
        examples = torch.randint(outputs, (spec["examples"], *shape))
    else:
        examples = torch.rand(spec["examples"], *shape)
    labels = torch.randint(outputs, (spec["examples"], rows))
    optimizer = torch.optim.SGD(net.parameters(), lr=spec["learning_rate"], momentum=spec["momentum"])

    def steps(count):
        for step in range(count):
            start = step * batch % (len(examples) - batch + 1)
            loss = F.cross_entropy(net(examples[start : start + batch]), labels[start : start + batch].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    steps(3)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < spec["seconds"]:
        steps(5)
        done += 5
    print(json.dumps({"samples_per_s": done * batch / (time.perf_counter() - started), "version": torch.__version__}))


def check(folder):
    from safetensors import safe_open
    from safetensors.torch import load_file

    torch.manual_seed(0)
    failed = False
    for path in sorted(Path(folder).glob("*.json")):
        spec = json.loads(path.read_text())
        file = path.with_suffix(".safetensors")
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["rodizio"], "the file carries no rodizio block"
        net = build(spec)
        net.load_state_dict(load_file(file), strict=True)
        expected = load_file(path.with_suffix(".expected"))
        features = expected.pop("features").reshape(-1, *spec["shape"])
        net.eval()
        off = [("outputs", (net(features) - expected.pop("outputs")).abs().max().item())]
        net.train()
        outputs = net(features)
        off.append(("outputs in training", (outputs - expected.pop("outputs_train")).abs().max().item()))
        outputs.backward(expected.pop("slope"))
        for name, parameter in net.named_parameters():
            off.append((f"gradient of {name}", (parameter.grad - expected[name]).abs().max().item()))
        name, worst = max(off, key=lambda pair: pair[1])
        failed |= not worst < 1e-4
        print(f"{path.stem}: off by {worst:.1e} at most ({name})")
    sys.exit(failed)


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(sys.argv[2])
    else:
        speed(json.loads(sys.argv[2]))
