"""Costs: multiply-accumulates by hand, parameters, bytes, and how turns are taken (never how long they last)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.cost import Latency, file_bytes, latencies, macs, parameters

L, D, H = 9, 32, 4  # tokens, width, heads


def test_a_convolution_and_a_linear_layer():
    convolution = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    assert macs(convolution, (4, 8, 10)) == (4 * 5) * 6 * (4 // 2) * 9
    assert parameters(convolution) == 6 * 2 * 9 + 6
    network = nn.Sequential(convolution, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 5, 10))
    assert macs(network, (4, 8, 10)) == (4 * 5) * 6 * 2 * 9 + 120 * 10
    assert parameters(network) == 6 * 2 * 9 + 6 + 12 + 1210


class Attention(nn.Module):
    """Self-attention of the rows of an image [B, 1, L, D]."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused, self.qkv, self.out = fused, nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, images: Tensor) -> Tensor:
        q, k, v = self.qkv(images[:, 0]).view(-1, L, 3, H, D // H).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-1, -2) / (D // H) ** 0.5).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


BLOCK = L * D * 3 * D + 2 * L * L * D + L * D * D  # qkv; scores and their mean over values; output


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_fused_or_not(fused):
    assert macs(Attention(fused), (1, L, D)) == BLOCK


def test_a_fused_encoder_layer_counts():
    """In eval mode torch runs this layer as one kernel, which a counter on real tensors takes for nothing."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(D, H, 64, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images[:, 0])

    assert macs(Rows(), (1, L, D)) == BLOCK + 2 * L * D * 64


@pytest.mark.parametrize(
    "name,published",  # G at 224 pixels, as the papers and timm's result tables have them; attention included
    [
        ("resnet50", 4.1),
        ("resnet18", 1.8),
        ("vit_base_patch16_224", 17.6),
        ("vit_tiny_patch16_224", 1.3),
        ("mobilenetv4_conv_small", 0.19),
        ("tiny_vit_5m_224", 1.3),
    ],
)
def test_published_numbers(name, published):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    assert macs(model, (3, 224, 224)) / 1e9 == pytest.approx(published, abs=0.06 if published > 0.5 else 0.006)


def test_a_network_is_left_as_it_was():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    macs(network, (1, 8, 8))
    assert [part.training for part in network] == [True, True, False]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network[0].weight.device.type == "cpu"


def test_a_shared_weight_counts_once():
    first = nn.Linear(5, 5, bias=False)
    assert parameters(nn.Sequential(first, nn.ReLU(), first)) == 25


def test_bytes_of_an_export(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_bytes(b"x" * 7)
    assert file_bytes(tmp_path) == 100
    (tmp_path / "head.safetensors").write_bytes(b"x" * 11)
    assert file_bytes(tmp_path) == 111


class Spy(nn.Module):
    """Notes who ran, on what, and how."""

    def __init__(self, name: str, runs: list):
        super().__init__()
        self.name, self.runs = name, runs

    def forward(self, images: Tensor) -> Tensor:
        state = (torch.is_inference_mode_enabled(), self.training, torch.get_num_threads(), images.dtype)
        self.runs.append((self.name, images.shape[0], state))
        return images


def test_networks_take_turns(monkeypatch):
    """The clock is replaced, so that a turn is one forward and takes what is said here."""
    import penstock.cost

    runs: list = []
    ticks = {"a": iter([0.004, 0.002, 0.003, 0.001] * 2), "b": iter([0.02, 0.01, 0.04, 0.03] * 2)}

    def clock(forward, count):
        forward()
        return next(ticks[runs[-1][0]])

    monkeypatch.setattr(penstock.cost, "_on_cpu", clock)
    monkeypatch.setattr(penstock.cost, "_warm_up", lambda forward, clock: 1.0)
    before = torch.get_num_threads()
    models = {name: (Spy(name, runs), (3, 4, 4)) for name in ("a", "b")}
    found = latencies(models, batches=(1, 5), rounds=4, threads=before + 1)
    assert torch.get_num_threads() == before
    assert [name for name, _, _ in runs] == list("abbaabba") * 2
    assert [batch for _, batch, _ in runs] == [1] * 8 + [5] * 8
    assert {state for _, _, state in runs} == {(True, False, before + 1, torch.float32)}
    assert found["a"][1] == found["a"][5] == Latency(2.5, 1.75, 3.25, (4.0, 2.0, 3.0, 1.0))
    assert found["b"][1].median == pytest.approx(25)
    assert found["b"][1].over(found["a"][1]) == pytest.approx((5 + 40 / 3) / 2)  # of 5, 5, 13.3 and 30


def test_the_clock_runs():
    found = latencies({"a": (nn.Conv2d(3, 4, 3), (3, 16, 16))}, batches=(2,), rounds=3)
    low, median, high = (found["a"][2].low, found["a"][2].median, found["a"][2].high)
    assert 0 < low <= median <= high and len(found["a"][2].rounds) == 3


def test_a_classifier_is_given_uint8():
    from penstock.backbones import Backbone
    from penstock.cost import _images
    from penstock.export import Classifier
    from penstock.head import Head

    options = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    config = Backbone.Config(name="vit_tiny_patch16_224", size=12, channels=1, options=options, pool="avg")
    backbone = Backbone(config)
    classifier = Classifier(backbone, Head(Head.Config(), backbone.dim, 5, backbone), list("abcde")).eval()
    assert _images(classifier, 2, (1, 12, 12), torch.device("cpu")).dtype == torch.uint8
    # 9 patches of 16 pixels; two blocks of attention and an MLP four times as wide; the class token is a tenth row
    tokens = 10
    block = tokens * 24 * 72 + 2 * tokens * tokens * 24 + tokens * 24 * 24 + 2 * tokens * 24 * 96
    assert macs(classifier, (1, 12, 12)) == 9 * 16 * 24 + 2 * block + 24 * 5
    assert macs(classifier, (1, 24, 24)) > 4 * macs(classifier, (1, 12, 12))
    assert parameters(classifier) == sum(value.numel() for value in classifier.state_dict().values())
