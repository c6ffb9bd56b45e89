"""Pairs of public networks whose target contains the source: the outputs are equal, and the plan says so."""

import importlib.util
from collections import Counter

import pytest
import torch
from torch import nn

from ghn_client.onnx.export import export_architecture
from ghn_client.outputs import largest_relative_difference
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import transfer_weights
from tests.transfer.pairs import randomise, transfer_between
from tests.zoo_support import import_timm, import_torchvision

SMALL, MEDIUM, LARGE = (3, 16, 16), (3, 32, 32), (3, 64, 64)
VGG_11 = [8, "M", 16, "M", 32, 32, "M", 64, 64, "M", 64, 64, "M"]
VGG_16 = [8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"]


def vgg(plan, factor=1):
    plan = [item if item == "M" else item * factor for item in plan]
    vgg_module = import_torchvision().models.vgg
    module = vgg_module.VGG(vgg_module.make_layers(plan, batch_norm=True), num_classes=10)
    width = 64 * factor
    module.avgpool = nn.AdaptiveAvgPool2d(1)
    module.classifier = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(), nn.Linear(2 * width, 10))
    return module


def resnet(block, layers, **options):
    models = import_torchvision().models
    return models.ResNet(getattr(models.resnet, block), layers, num_classes=10, **options)


def timm_resnet(width, layers, block="BasicBlock", **options):
    timm = import_timm()
    widths = tuple(width * 2**i for i in range(4))
    kind = getattr(timm.models.resnet, block)
    return timm.models.resnet.ResNet(kind, layers, num_classes=10, channels=widths, stem_width=width, **options)


def of(library, name, *args, **options):
    package = import_torchvision().models if library == "torchvision" else import_timm().models
    return getattr(package, name)(*args, num_classes=10, **options)


def mobilenet(width, setting):
    return of("torchvision", "mobilenet_v2", width_mult=width, inverted_residual_setting=setting)


def densenet(growth, layers, start):
    return of("torchvision", "DenseNet", growth, layers, start)


def convnext(width, depths, **options):
    widths = tuple(width * 2**i for i in range(4))
    return of("timm", "ConvNeXt", dims=widths, depths=depths, ls_init_value=0.5, **options)


def torchvision_vit(**options):
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, **options}
    return of("torchvision", "VisionTransformer", 16, 4, **sizes)


def timm_vit(**options):
    return of("timm", "VisionTransformer", patch_size=4, **{"img_size": 16, "depth": 2, "num_heads": 2, **options})


def swin(width, depths, heads):
    return of("torchvision", "SwinTransformer", [2, 2], width, depths, heads, [4, 4])


def timm_lite(name):
    return import_timm().create_model(name, num_classes=10)


TWO = (1, 1, 1, 1)
PAIRS = {
    "resnet, deeper": (lambda: resnet("BasicBlock", TWO), lambda: resnet("BasicBlock", (2, 3, 2, 1)), LARGE),
    "resnet, 4x wider": (lambda: timm_resnet(4, TWO), lambda: timm_resnet(16, (2, 1, 1, 2)), LARGE),
    "resnet, odd widths": (lambda: timm_resnet(8, TWO), lambda: timm_resnet(13, TWO), LARGE),
    "bottleneck, deeper": (lambda: resnet("Bottleneck", TWO), lambda: resnet("Bottleneck", (2, 3, 1, 2)), LARGE),
    "bottleneck, wider inside": (
        lambda: resnet("Bottleneck", TWO), lambda: resnet("Bottleneck", TWO, width_per_group=100), LARGE
    ),
    "resnext, more and wider groups": (
        lambda: resnet("Bottleneck", TWO, groups=4, width_per_group=8),
        lambda: resnet("Bottleneck", (1, 2, 1, 1), groups=8, width_per_group=16),
        LARGE,
    ),
    "squeeze and excitation": (
        lambda: timm_resnet(8, TWO, block_args={"attn_layer": "se"}),
        lambda: timm_resnet(16, (2, 2, 1, 1), block_args={"attn_layer": "se"}),
        LARGE,
    ),
    "resnet-d": (
        lambda: timm_resnet(8, TWO, "Bottleneck", stem_type="deep", avg_down=True),
        lambda: timm_resnet(12, (2, 1, 2, 1), "Bottleneck", stem_type="deep", avg_down=True),
        LARGE,
    ),
    "group norm": (
        lambda: timm_resnet(8, TWO, norm_layer=lambda width, **_: nn.GroupNorm(4, width)),
        lambda: timm_resnet(16, (2, 1, 1, 1), norm_layer=lambda width, **_: nn.GroupNorm(4, width)),
        LARGE,
    ),
    "vgg 11 in 16": (lambda: vgg(VGG_11), lambda: vgg(VGG_16), MEDIUM),
    "vgg 11 in 16, twice as wide": (lambda: vgg(VGG_11), lambda: vgg(VGG_16, 2), MEDIUM),
    "mobilenet, wider, deeper, more expansion": (
        lambda: mobilenet(0.5, [[1, 16, 1, 1], [3, 24, 2, 2], [3, 32, 2, 2]]),
        lambda: mobilenet(1.0, [[1, 16, 1, 1], [6, 24, 3, 2], [6, 32, 4, 2]]),
        LARGE,
    ),
    "efficientnet lite 0 in 1": (
        lambda: timm_lite("efficientnet_lite0"), lambda: timm_lite("efficientnet_lite1"), LARGE
    ),
    "densenet, deeper": (
        lambda: densenet(8, (2, 2), 16), lambda: densenet(8, (4, 3), 16), LARGE
    ),
    "densenet, wider and deeper": (
        lambda: densenet(8, (2, 2), 16), lambda: densenet(12, (3, 2), 24), LARGE
    ),
    "convnext, deeper": (
        lambda: convnext(8, (1, 1, 2, 1)), lambda: convnext(8, (2, 1, 4, 3)), LARGE
    ),
    "convnext, wider": (
        lambda: convnext(8, (1, 1, 2, 1)), lambda: convnext(16, (2, 1, 2, 1)), LARGE
    ),
    "convnext, larger kernels": (
        lambda: convnext(8, (1, 1, 1, 1), kernel_sizes=5), lambda: convnext(8, (1, 1, 1, 1), kernel_sizes=7), LARGE
    ),
    "vit, 3x deeper": (torchvision_vit, lambda: torchvision_vit(num_layers=6), SMALL),
    "vit, wider mlp": (torchvision_vit, lambda: torchvision_vit(mlp_dim=150), SMALL),
    "vit, more heads": (torchvision_vit, lambda: torchvision_vit(hidden_dim=64, num_heads=4, mlp_dim=128), SMALL),
    "vit, wider heads": (torchvision_vit, lambda: torchvision_vit(hidden_dim=64, mlp_dim=128, num_layers=3), SMALL),
    "vit, one head in two": (
        lambda: torchvision_vit(num_heads=1), lambda: torchvision_vit(hidden_dim=64, mlp_dim=128), SMALL
    ),
    "vit, normalised queries": (
        lambda: timm_vit(embed_dim=32, qk_norm=True, init_values=0.5),
        lambda: timm_vit(embed_dim=64, num_heads=4, depth=4, qk_norm=True, init_values=0.5),
        SMALL,
    ),
    "vit, 4x wider": (lambda: timm_vit(embed_dim=32), lambda: timm_vit(embed_dim=128, num_heads=8, depth=4), SMALL),
    "mixer": (
        lambda: of("timm", "MlpMixer", img_size=16, patch_size=4, num_blocks=2, embed_dim=32),
        lambda: of("timm", "MlpMixer", img_size=16, patch_size=4, num_blocks=4, embed_dim=64),
        SMALL,
    ),
    "swin, deeper": (lambda: swin(16, [2, 2], [2, 4]), lambda: swin(16, [2, 6], [2, 4]), MEDIUM),
    "swin, wider": (lambda: swin(16, [2, 2], [2, 4]), lambda: swin(32, [4, 2], [4, 8]), MEDIUM),
}  # fmt: skip
QUICK = ("resnet, odd widths", "vgg 11 in 16", "densenet, wider and deeper", "vit, wider heads")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PAIRS])
def test_a_network_inside_another_keeps_its_function(name):
    build_source, build_target, size = PAIRS[name]
    torch.manual_seed(0)
    example = torch.zeros(1, *size)
    source, target = randomise(build_source(), example, seed=0), randomise(build_target(), example, seed=1)
    result = transfer_between(source, target, example)
    images = torch.randn(4, *size)
    with torch.no_grad():
        expected, actual = source(images), target(images)
    assert largest_relative_difference(expected[:2], expected[2:]) > 1e-3  # the source does tell images apart
    assert largest_relative_difference(expected, actual) <= 1e-4
    assert result.plan.is_exact, result.plan.warnings


def gpt2(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 16, **options}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, bos_token_id=1, eos_token_id=2, use_cache=False, **sizes)
    )


def llama(**options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, **options}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{"num_hidden_layers": 2, **sizes}, vocab_size=50, head_dim=8, use_cache=False)
    )


LANGUAGE_PAIRS = {
    "gpt2, deeper": (gpt2, {"n_layer": 5}),
    "gpt2, more heads": (gpt2, {"n_embd": 64, "n_head": 4}),
    "gpt2, wider heads": (gpt2, {"n_embd": 64}),
    "gpt2, more positions and mlp": (gpt2, {"n_positions": 40, "n_inner": 200}),
    "llama, deeper": (llama, {"num_hidden_layers": 5}),
    "llama, more heads": (llama, {"num_attention_heads": 16, "num_key_value_heads": 4}),
    "llama, wider": (llama, {"hidden_size": 64, "intermediate_size": 101, "num_hidden_layers": 3}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE_PAIRS)
def test_a_language_model_inside_another_keeps_its_function(name):
    if importlib.util.find_spec("torchvision"):
        import_torchvision()  # transformers imports it, and must find it whole
    build, options = LANGUAGE_PAIRS[name]
    torch.manual_seed(0)
    source, target = build().eval(), build(**options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*source.parameters(), *target.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    tokens = torch.randint(0, 50, (3, 8), generator=generator)
    structures = [export_architecture(model, {"input_ids": tokens[:1]}) for model in (source, target)]
    result = transfer_weights(Source("trained", structures[0], source.state_dict()), structures[1])
    target.load_state_dict(result.tensors, strict=False)
    target.tie_weights()
    with torch.no_grad():
        assert largest_relative_difference(source(tokens).logits, target(tokens).logits) <= 1e-4
    assert result.plan.is_exact, result.plan.warnings
    assert not Counter(result.plan.origins.values())["cut"]
