"""MAE against golden numbers of the reference implementation, and against a slow transcription of the paper."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from penstock.backbones import Backbone
from penstock.errors import InputError
from penstock.streams.batch import Batch
from penstock.task import weighted_mean
from pretrain.methods._mae_pictures import visible_statistics
from pretrain.methods._patches import patchify, sincos_positions, take, unpatchify
from pretrain.methods.mae import MAE
from tests.numerics import formula
from tests.numerics.golden.make_mae import BATCH, CASES

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("mae.json").read_text())


def make(
    size: Any = 32, channels: int = 3, seed: int = 0, norm_pix: bool = True, decoder: tuple = (32, 2, 4), **options: Any
) -> MAE:
    torch.manual_seed(seed)
    options = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, **options}
    backbone = Backbone(
        Backbone.Config(
            name="vit_tiny_patch16_224", size=size, channels=channels, mean=(0.5,), std=(0.2,), options=options
        )
    )
    dim, depth, heads = decoder
    config = MAE.Config(decoder_dim=dim, decoder_depth=depth, decoder_heads=heads, norm_pix=norm_pix)
    return MAE(config, backbone, seed)


def batch_of(images: Tensor, first: int = 0, weights: Tensor | None = None) -> Batch:
    B = len(images)
    return Batch(
        [images], torch.full((B,), -1), torch.ones(B) if weights is None else weights, torch.arange(first, first + B)
    )


def bytes_of(B: int, channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (B, channels, height, width), dtype=torch.uint8, generator=generator)


def reference_name(name: str) -> str:
    """The name in the reference implementation of one of our parameters."""
    if name.startswith("backbone.model."):
        return name.removeprefix("backbone.model.")
    name = name.removeprefix("decoder.")
    return name if name == "mask_token" else f"decoder_{name}"


# Golden numbers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_loss_and_gradients_of_the_reference(case: str, dtype: torch.dtype, close: float) -> None:
    o, golden = CASES[case], GOLDEN[case]
    model = make(
        o["img_size"], norm_pix=o["norm_pix_loss"],
        decoder=(o["decoder_embed_dim"], o["decoder_depth"], o["decoder_num_heads"]),
        patch_size=o["patch_size"], embed_dim=o["embed_dim"], depth=o["depth"], num_heads=o["num_heads"],
    ).to(dtype)  # fmt: skip
    assert {reference_name(name) for name, _ in model.named_parameters()} == set(golden["gradients"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(formula.weight(reference_name(name), parameter.shape))
    images = 2 * formula.tensor(f"images of {case}", (BATCH, 3, o["img_size"], o["img_size"])).to(dtype)
    L = model.grid[0] * model.grid[1]
    result = model.reconstruct(images, formula.tensor(f"noise of {case}", (BATCH, L)).to(dtype), o["mask_ratio"])
    kept = L - result.pred.shape[1]

    hidden = torch.ones(BATCH, L).scatter(1, result.order[:, :kept], 0)
    assert ["".join(str(int(each)) for each in row) for row in hidden] == golden["mask"]
    assert formula.summary("positions", model.backbone.model.pos_embed[0]) == pytest.approx(
        golden["positions"], rel=1e-6
    )
    pred = torch.zeros(BATCH, L, result.pred.shape[2], dtype=dtype)
    pred.scatter_(1, result.order[:, kept:, None].expand_as(result.pred), result.pred.detach())
    assert formula.summary("pred", pred) == pytest.approx(golden["pred"], rel=10 * close)

    loss = result.losses.mean()  # the reference's mean over all hidden patches: every sample hides as many
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], rel=max(close, 1e-7))  # the loss is fp32 or better
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        norm, product = golden["gradients"][reference_name(name)]
        found = formula.summary(reference_name(name), parameter.grad)
        # A bias of keys has no gradient in exact arithmetic, so products are compared on the scale of the norm.
        assert found == pytest.approx([norm, product], rel=max(close, 1e-6), abs=max(close, 1e-6) * norm), name


def test_golden_sincos_table() -> None:
    table = sincos_positions(16, (14, 14))
    for row, values in GOLDEN["table 14 x 14"]["rows"].items():
        torch.testing.assert_close(table[int(row)], torch.tensor(values), rtol=0, atol=1e-6)
    assert not torch.allclose(table.view(14, 14, 16), table.view(14, 14, 16).transpose(0, 1))  # the order matters
    # A row of a wide grid and of a square one with as many columns are the same.
    torch.testing.assert_close(sincos_positions(16, (3, 14)), table[: 3 * 14], rtol=0, atol=0)


# A slow transcription of the paper: tokens in place, one sample and one patch at a time


def attention(x: Tensor, block: Any) -> Tensor:
    weight, bias, heads = block.attn.qkv.weight, block.attn.qkv.bias, block.attn.num_heads
    q, k, v = (x @ part.T + b for part, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    width = q.shape[-1] // heads
    parts = []
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        parts.append(((q[:, at] @ k[:, at].T) / width**0.5).softmax(-1) @ v[:, at])
    return torch.cat(parts, 1) @ block.attn.proj.weight.T + block.attn.proj.bias


def norm(x: Tensor, layer: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def transformer(x: Tensor, blocks: Any) -> Tensor:
    for block in blocks:
        x = x + attention(norm(x, block.norm1), block)
        inner = F.gelu(norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        x = x + inner @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return x


def slow_loss(model: MAE, image: Tensor, noise: Tensor, ratio: float) -> Tensor:
    vit, decoder, (p, q) = model.backbone.model, model.decoder, model.patch
    rows, columns = image.shape[1] // p, image.shape[2] // q
    L = rows * columns
    ranked = sorted(range(L), key=lambda place: noise[place].item())
    visible = set(ranked[: int(L * (1 - ratio))])
    tokens, targets = {}, {}
    for place in range(L):
        row, column = divmod(place, columns)
        pixels = image[:, row * p : (row + 1) * p, column * q : (column + 1) * q]
        tokens[place] = (vit.patch_embed.proj.weight * pixels).sum((1, 2, 3)) + vit.patch_embed.proj.bias
        targets[place] = torch.stack([pixels[c, i, j] for i in range(p) for j in range(q) for c in range(len(pixels))])
        if model.config.norm_pix:
            n, mean = len(targets[place]), targets[place].mean()
            variance = (targets[place] - mean).pow(2).sum() / (n - 1)
            targets[place] = (targets[place] - mean) / (variance + 1e-6).sqrt()
    in_place = [place for place in range(L) if place in visible]
    sequence = [vit.cls_token[0, 0], *(tokens[place] + vit.pos_embed[0, 1 + place] for place in in_place)]
    encoded = norm(transformer(torch.stack(sequence), vit.blocks), vit.norm)
    embedded = encoded @ decoder.embed.weight.T + decoder.embed.bias
    known = dict(zip(in_place, embedded[1:], strict=True))
    full = [known.get(place, decoder.mask_token[0, 0]) + decoder.positions[place] for place in range(L)]
    decoded = norm(transformer(torch.stack([embedded[0], *full]), decoder.blocks), decoder.norm)
    pred = decoded[1:] @ decoder.pred.weight.T + decoder.pred.bias
    return torch.stack([(pred[i] - targets[i]).pow(2).mean() for i in range(L) if i not in visible]).mean()


@pytest.mark.parametrize(
    ("size", "channels", "patch", "ratio", "norm_pix"),
    [((16, 24), 1, 4, 0.75, True), ((24, 12), 2, (6, 4), 0.6, True), (16, 5, 8, 0.5, False), (20, 3, 4, 0.9, False)],
)
def test_against_a_slow_transcription(size: Any, channels: int, patch: Any, ratio: float, norm_pix: bool) -> None:
    model = make(size, channels, norm_pix=norm_pix, patch_size=patch, embed_dim=24).double()
    height, width = model.backbone.size
    images = model.backbone.normalize(bytes_of(2, channels, height, width)).double()
    noise = torch.rand(2, model.grid[0] * model.grid[1], dtype=torch.float64)
    fast = model.reconstruct(images, noise, ratio).losses
    slow = torch.stack([slow_loss(model, image, n, ratio) for image, n in zip(images, noise, strict=True)])
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=0)
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(fast.sum(), list(parameters.values()))
    theirs = torch.autograd.grad(slow.sum(), list(parameters.values()))
    for name, mine, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# Patches and masks


def test_order_inside_a_patch() -> None:
    image = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)  # channel 0 starts at 0, channel 1 at 24
    patches = patchify(image, (2, 3))
    assert patches.shape == (1, 4, 12)
    assert patches[0, 1].tolist() == [3, 27, 4, 28, 5, 29, 9, 33, 10, 34, 11, 35]  # row, column, then channel
    assert torch.equal(unpatchify(patches, (2, 3), (4, 6)), image)


def test_take_is_gather() -> None:
    values, indices = torch.randn(3, 7, 4), torch.stack([torch.randperm(7)[:5] for _ in range(3)])
    assert torch.equal(take(values, indices), values.gather(1, indices[..., None].expand(-1, -1, 4)))


def test_numbers_of_visible_patches() -> None:
    model = make(112)  # 14 x 14 patches
    shown = []
    model.backbone.model.blocks.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0].shape[1]))
    for ratio in (0.75, 0.6, 0.999, 0.001):
        model.reconstruct(torch.zeros(1, 3, 112, 112), torch.rand(1, 196), ratio)
    assert shown == [1 + 49, 1 + int(196 * 0.4), 1 + 1, 1 + 195]


def test_masks_follow_the_sample_alone() -> None:
    model = make()
    orders: list[Tensor] = []
    inner = model.core.forward

    def spy(*arguments: Any) -> Any:
        result = inner(*arguments)
        orders.append(result.order)
        return result

    model.core.forward = spy  # type: ignore[method-assign]
    images = bytes_of(6, 3, 32, 32)
    model(batch_of(images), {"mask_ratio": 0.75})
    model(batch_of(images[4:], first=4), {"mask_ratio": 0.75})  # as another rank would see it
    model.seed = 1
    model(batch_of(images), {"mask_ratio": 0.75})
    assert torch.equal(orders[0][4:], orders[1])
    assert len({tuple(row.tolist()) for row in orders[0]}) == 6
    assert not torch.equal(orders[0], orders[2])


def test_every_patch_is_hidden_as_often() -> None:
    from penstock import keyed
    from pretrain.methods.mae import MASKS

    noise = keyed.uniform(3, MASKS, torch.arange(4000), 16)
    hidden = torch.zeros(16).index_add(0, noise.argsort(1)[:, 4:].flatten(), torch.ones(4000 * 12)) / 4000
    assert (hidden - 0.75).abs().max() < 0.03  # 4 standard deviations


def test_hidden_pixels_are_not_seen_and_visible_ones_not_scored() -> None:
    model = make(norm_pix=False).eval()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    noise = torch.rand(2, 16)
    result = model.reconstruct(images, noise, 0.75)
    (seen,) = torch.autograd.grad(result.pred.sum(), images, retain_graph=True)
    influence = patchify(seen, model.patch).abs().sum(-1)
    assert influence.gather(1, result.order[:, 4:]).max() == 0
    assert influence.gather(1, result.order[:, :4]).min() > 0
    target_patches = patchify(images.detach(), model.patch)
    rebuilt = (result.pred - take(target_patches, result.order[:, 4:])).square().mean((1, 2))
    torch.testing.assert_close(result.losses, rebuilt)


@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
@pytest.mark.parametrize(
    "options",
    [{}, {"reg_tokens": 2}, {"no_embed_class": True, "reg_tokens": 1}, {"pre_norm": True}, {"init_values": 0.1},
     {"class_token": False, "global_pool": "avg", "fc_norm": False}],
)  # fmt: skip
def test_keeping_all_patches_is_the_plain_vit(size: tuple[int, int], options: dict) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = make().eval()
    if options:
        vit = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=64,
            depth=2,
            num_heads=4,
            num_classes=0,
            dynamic_img_size=True,
            **options,
        ).eval()
        backbone = make().backbone
        backbone.model = vit
        model = MAE(MAE.Config(decoder_dim=32, decoder_depth=1, decoder_heads=4), backbone, 0).eval()
    images = torch.randn(2, 3, *size)
    grid = model.grid_of(size)
    everything = torch.arange(grid[0] * grid[1]).expand(2, -1)
    with torch.no_grad():
        encoded = model.encode(patchify(images, model.patch), everything, grid)
        torch.testing.assert_close(encoded, model.backbone.model.forward_features(images), rtol=1e-5, atol=1e-5)
        assert model.reconstruct(images, torch.rand(2, grid[0] * grid[1]), 0.75).losses.isfinite().all()


# Loss


def test_bytes_and_normalised_floats_agree() -> None:
    model, images = make(), bytes_of(2, 3, 32, 32)
    noise = torch.rand(2, 16)
    as_float = model.reconstruct(model.backbone.normalize(images), noise, 0.75).losses
    torch.testing.assert_close(model.reconstruct(images, noise, 0.75).losses, as_float)


def test_slots_without_weight_do_not_count() -> None:
    model, images = make(), bytes_of(4, 3, 32, 32)
    output = model(batch_of(images, weights=torch.tensor([1.0, 0, 1, 0])), {"mask_ratio": 0.75})
    first, third = (model(batch_of(images[i : i + 1], first=i), {"mask_ratio": 0.75}).loss for i in (0, 2))
    torch.testing.assert_close(output.loss, (first + third) / 2)
    assert output.weight == 2
    empty = model(batch_of(images, weights=torch.zeros(4)), {"mask_ratio": 0.75})
    assert empty.loss == 0 and empty.weight == 0
    empty.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


def test_uneven_ranks_equal_one_process() -> None:
    model, images = make(), bytes_of(5, 3, 32, 32)
    weights = torch.tensor([1.0, 1, 1, 0, 1])
    whole = model(batch_of(images, weights=weights), {"mask_ratio": 0.75})
    parts = [
        model(batch_of(images[:3], 0, weights[:3]), {"mask_ratio": 0.75}),
        model(batch_of(images[3:], 3, weights[3:]), {"mask_ratio": 0.75}),
    ]
    losses, counts = torch.stack([p.loss for p in parts]), torch.stack([p.weight for p in parts])
    torch.testing.assert_close(weighted_mean(losses, counts), whole.loss)


@pytest.mark.parametrize(("channels", "patch"), [(1, 4), (3, 8)])
def test_collapse_loss_is_the_loss_of_a_constant(channels: int, patch: int) -> None:
    model = make(channels=channels, patch_size=patch)
    torch.nn.init.zeros_(model.decoder.pred.weight)
    loss = model(batch_of(bytes_of(8, channels, 32, 32)), {"mask_ratio": 0.75}).loss
    assert loss.item() == pytest.approx(model.collapse_loss, abs=1e-5)
    assert make(norm_pix=False).collapse_loss is None


# Weights and precision


def test_initial_weights() -> None:
    model = make(embed_dim=192, num_heads=3)
    vit, decoder = model.backbone.model, model.decoder
    for weight, fan in ((vit.patch_embed.proj.weight, 3 * 8 * 8 + 192), (vit.blocks[0].attn.qkv.weight, 4 * 192)):
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    for token in (vit.cls_token, decoder.mask_token):
        assert 0.013 < token.std() < 0.027
    assert all(layer.eps == 1e-6 for layer in model.modules() if isinstance(layer, torch.nn.LayerNorm))
    assert all(layer.bias.abs().max() == 0 for layer in model.modules() if isinstance(layer, torch.nn.Linear))


def test_positions_are_buffers() -> None:
    model = make()
    assert not any("pos" in name for name, _ in model.named_parameters())
    buffers = dict(model.named_buffers())
    assert torch.equal(buffers["backbone.model.pos_embed"][0, 1:], sincos_positions(64, (4, 4)))
    assert "backbone.model.pos_embed" in model.state_dict()  # timm's name, so that an export holds it
    assert model.decoder.no_weight_decay() == {"mask_token"}


def test_pure_bf16_keeps_positions_exact() -> None:
    model = make()
    for parameter in model.parameters():  # as DeepSpeed does: parameters change type, buffers do not
        parameter.data = parameter.data.bfloat16()
    images = bytes_of(2, 3, 32, 32)
    output = model(batch_of(images), {"mask_ratio": 0.75})
    output.loss.backward()
    assert output.loss.dtype == torch.float32 and model.backbone.model.pos_embed.dtype == torch.float32
    features = model.backbone(images)
    assert features.pooled.dtype == torch.bfloat16 and features.pooled.isfinite().all()
    exact = make()(batch_of(images), {"mask_ratio": 0.75}).loss
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_autocast_is_close() -> None:
    model, batch = make(), batch_of(bytes_of(4, 3, 32, 32))
    exact = model(batch, {"mask_ratio": 0.75}).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch, {"mask_ratio": 0.75}).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)


def test_activation_checkpointing_changes_nothing() -> None:
    model, batch = make(), batch_of(bytes_of(2, 3, 32, 32))
    model(batch, {"mask_ratio": 0.75}).loss.backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.backbone.model.set_grad_checkpointing()
    model(batch, {"mask_ratio": 0.75}).loss.backward()
    assert all(torch.equal(p.grad, other) for p, other in zip(model.parameters(), plain, strict=True))


def test_compiles_as_one_graph() -> None:
    model, batch = make(), batch_of(bytes_of(2, 3, 32, 32))
    expected = model(batch, {"mask_ratio": 0.75}).loss
    names = set(model.state_dict())
    (part,) = model.compiled_parts()
    part.compile(backend="aot_eager", fullgraph=True)
    loss = model(batch, {"mask_ratio": 0.75}).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(model.state_dict()) == names and not list(part.parameters())


def test_other_sizes_in_one_run() -> None:
    model = make()
    losses = [model(batch_of(bytes_of(2, 3, side, side)), {"mask_ratio": 0.75}).loss for side in (24, 32, 48)]
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)


# What cannot work


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask_ratio": 1.0}, "between 0 and 1"),
        ({"mask_ratio": 0.0}, "between 0 and 1"),
        ({"mask_ratio": {"name": "linear", "start": 0.5, "end": 1.2}}, "between 0 and 1"),
        ({"mask_ratio": {"name": "cosine", "start": 0.9, "end": 0.6, "warmup": 0.1}}, "between 0 and 1"),  # from 0
        ({"decoder_dim": 60, "decoder_heads": 16}, "do not divide"),
        ({"decoder_dim": 6}, "multiple of 4"),
        ({"norm_pixels": True}, "norm_pixels"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        MAE.Config(**options)


def test_a_curve_of_the_mask_ratio() -> None:
    config = MAE.Config(mask_ratio={"name": "linear", "start": 0.5, "end": 0.9}, decoder_dim=32, decoder_heads=4)  # type: ignore[arg-type]
    model = MAE(config, make().backbone, 0)
    assert "reconstruction" in model.pictures(batch_of(bytes_of(2, 3, 32, 32)))


@pytest.mark.parametrize(
    "name", ["resnet18", "beit_base_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_r50_s16_224"]
)
def test_backbones_of_another_kind_are_refused_by_name(name: str) -> None:
    problems = MAE.conflicts(SimpleNamespace(backbone=Backbone.Config(name=name)))
    assert len(problems) == 1 and f"{name} is a" in problems[0]


@pytest.mark.parametrize(
    ("name", "size", "options", "says"),
    [
        ("resnet18", 32, {}, "resnet18 is a ResNet"),
        ("vit_tiny_patch16_224", 16, {"depth": 1}, "single patch"),
        ("vit_tiny_patch16_224", 32, {"depth": 1, "patch_drop_rate": 0.5}, "patch_drop_rate"),
        ("vit_tiny_patch16_224", 32, {"depth": 1, "pos_embed": "none"}, "no position embedding"),
    ],
)  # fmt: skip
def test_backbones_that_do_not_work_are_refused(name: str, size: int, options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        MAE(MAE.Config(), Backbone(Backbone.Config(name=name, size=size, options=options)), 0)


def test_images_that_the_patch_does_not_divide() -> None:
    with pytest.raises(InputError, match="let the augmentation give 32 x 24"):
        make()(batch_of(bytes_of(2, 3, 36, 30)), {"mask_ratio": 0.75})


# Pictures


@pytest.mark.parametrize(("channels", "norm_pix"), [(3, True), (1, False), (4, True)])
def test_pictures(channels: int, norm_pix: bool) -> None:
    model = make(channels=channels, norm_pix=norm_pix)
    state = torch.get_rng_state()
    pictures = model.pictures(batch_of(bytes_of(8, channels, 32, 32)))
    assert torch.equal(state, torch.get_rng_state()) and model.training
    for picture in pictures.values():
        assert picture.dtype == torch.uint8 and picture.shape[0] == 3


def test_visible_statistics_look_at_visible_patches_alone() -> None:
    patches = torch.randn(2, 16, 48)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    guessed = visible_statistics(patches, order, 4, (4, 4))
    changed = patches.scatter(1, order[:, 4:, None].expand(-1, -1, 48), float("nan"))
    for one, other in zip(guessed, visible_statistics(changed, order, 4, (4, 4)), strict=True):
        assert one.shape == (2, 12, 1) and torch.equal(one, other)
    level = torch.full((1, 16, 48), 3.0)
    torch.testing.assert_close(visible_statistics(level, order[:1], 4, (4, 4))[0], torch.full((1, 12, 1), 3.0))
