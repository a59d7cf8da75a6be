"""Changes of weights in image towers of timm's and in odd ones of open_clip's, against references.

A reference is a copy of the model, made before it became a backbone, run by its own forward at
weights that are changed by hand.
"""

import copy
from functools import partial

import pytest
import timm
import torch
from miniatures import tiny_config
from open_clip import SimpleTokenizer
from open_clip.model import CustomTextCLIP
from test_towers import siglip
from theirs import make_folder
from torch.func import functional_call

from dapt.clip.backbone import Backbone, Preprocessing
from dapt.clip.image import encode_image
from dapt.clip.image_only import ImageOnly, ImageTower
from dapt.clip.inside import Pass
from dapt.clip.sources import load_backbone
from dapt.engine.classifier import inside_of, new_classifier
from dapt.errors import UserError
from dapt.methods import get_method
from dapt.methods.class_vectors import ClassVectors
from dapt.methods.layouts import DASSL
from dapt.predict import predict_each
from dapt.run.load import load_classifier
from dapt.run.train import Target, evaluate_run, train
from dapt.settings import make_settings
from dapt.share.exchange import published_files
from dapt.share.export import export

NAMES = ["cat", "dog", "zebra"]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4,
         "num_classes": 0}  # fmt: skip
EVA = partial(timm.models.Eva, **SMALL)
FAST = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128), "mlp_ratios": (2, 2, 2, 2),
        "token_mixers": ("repmixer",) * 3 + ("attention",), "num_classes": 0}  # fmt: skip
# With each its layers' maps: names, and where their weights are in the trunk.
BLOCK = {("q", "k", "v"): "blocks.{}.attn.qkv", ("o",): "blocks.{}.attn.proj",
         ("fc",): "blocks.{}.mlp.fc1", ("proj",): "blocks.{}.mlp.fc2"}  # fmt: skip
APART = {("q",): "blocks.{}.attn.q_proj", ("k",): "blocks.{}.attn.k_proj",
         ("v",): "blocks.{}.attn.v_proj"}  # fmt: skip
TOWERS = {
    "ViT": (lambda: timm.models.VisionTransformer(**SMALL, reg_tokens=2), BLOCK, range(3)),
    "Eva, biases beside": (lambda: EVA(swiglu_mlp=True), BLOCK, range(3)),
    "Eva, rotations": (
        lambda: EVA(use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
        {**BLOCK, **APART, ("fc",): "blocks.{}.mlp.fc1_x"}, range(3),
    ),
    "Eva of PE": (lambda: EVA(attn_type="rope", use_rot_pos_emb=True), BLOCK, range(3)),
    "FastVit": (lambda: timm.models.FastVit(**FAST),
                {("q", "k", "v"): "stages.3.blocks.{}.token_mixer.qkv",
                 ("o",): "stages.3.blocks.{}.token_mixer.proj"}, range(1)),
    "ConvNeXt": (lambda: timm.models.ConvNeXt(depths=(1,) * 4, dims=(8, 16, 16, 24), num_classes=0),
                 {("fc",): "stages.{}.blocks.0.mlp.fc1", ("proj",): "stages.{}.blocks.0.mlp.fc2"},
                 range(4)),
}  # fmt: skip
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def backbone_of(trunk, name="small"):
    seen = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    how = {"name": name, "device": torch.device("cpu"), "precision": "fp32"}
    return Backbone(ImageOnly(ImageTower(trunk, 32)), None, seen, **how)


def made(name):
    """A random trunk's backbone, its reference, and its maps by layer."""
    make, maps, layers = TOWERS[name]
    torch.manual_seed(3)
    trunk = make().eval()
    with torch.no_grad():  # biases too
        for parameter in trunk.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    places = [{n: place.format(i) for n, place in maps.items() if "{}" in place} for i in layers]
    if name.startswith("Eva, rot"):
        places = [{n: place for n, place in own.items() if len(n) == 1} for own in places]
    return backbone_of(trunk), copy.deepcopy(trunk), places


def part_of(backbone, method, tower, **given):
    """A method's part of a tower, with changes that are no longer zero."""
    given = {"dataset": "bundled", "method": method, **given}
    settings = make_settings(given)
    classifier = new_classifier(backbone, NAMES, "a {}.", get_method(method), settings)
    (part,) = (p for p in classifier.parts if tower in p.towers and type(p) is not ClassVectors)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return part


def changed(reference, places, part):
    """Weights of a reference by hand, gradients reaching what a part learns, by their names."""
    weights = dict(reference.named_parameters())
    found = {}
    for layer, own in enumerate(places):
        for names, place in own.items():
            rows = weights[f"{place}.weight"].detach().chunk(len(names))
            changes = [part.change(layer, name) for name in names]
            both = zip(rows, changes, strict=True)
            found[f"{place}.weight"] = torch.cat([r if c is None else r + c for r, c in both])
    return found


def compare(found, expected, part):
    """Forward passes and gradients are near."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    learned = [*part.parameters()]
    one, other = (torch.autograd.grad((x * weights).sum(), learned) for x in (found, expected))
    for a, b in zip(one, other, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("name", TOWERS)
def test_low_rank_changes_follow_their_equations(name):
    backbone, reference, places = made(name)
    maps = [name for names in places[0] for name in names]
    part = part_of(backbone, "clip-lora", "image", lora_maps=maps, lora_dropout=0.0)
    assert len(part.visual_lora) == len(places)
    # Of which a FastViT has more than one token where its attention is.
    pixels = torch.randn(2, 3, 64, 64) if name == "FastVit" else PIXELS
    found = encode_image(backbone.visual, pixels, inside_of([part], "image"))
    weights = changed(reference, places, part)
    assert len(weights) == len(places) * len(places[0])
    compare(found, functional_call(reference, weights, (pixels,)), part)
    with torch.no_grad():
        bare = reference(pixels)
        assert (found - bare).norm() > 1e-3 * bare.norm()
        torch.testing.assert_close(encode_image(backbone.visual, pixels), bare)  # stays as it was
        part.requires_grad_(False)  # merged from here on
        merged = encode_image(backbone.visual, pixels, inside_of([part], "image"))
    torch.testing.assert_close(merged, found.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ViT", "Eva, biases beside", "Eva, rotations"])
def test_singular_values_follow_their_equations(name):
    backbone, reference, places = made(name)
    part = part_of(backbone, "clip-svd", "image")
    found = encode_image(backbone.visual, PIXELS, inside_of([part], "image"))
    compare(found, functional_call(reference, changed(reference, places, part), (PIXELS,)), part)


def test_maps_that_are_not_named_stay_frozen():
    backbone, reference, places = made("ViT")
    part = part_of(backbone, "clip-lora", "image", lora_maps=("v",), lora_dropout=0.0)
    assert {n.split(".")[2] for n, _ in part.named_parameters()} == {"v"}
    found = encode_image(backbone.visual, PIXELS, inside_of([part], "image"))
    weights = changed(reference, places, part)
    for i in range(3):
        own, whole = weights[f"blocks.{i}.attn.qkv.weight"], reference.blocks[i].attn.qkv.weight
        assert torch.equal(own[:64], whole[:64])
        assert not torch.equal(own[64:], whole[64:])
    compare(found, functional_call(reference, weights, (PIXELS,)), part)


def test_what_is_dropped_is_a_function_of_the_step():
    backbone, *_ = made("ViT")
    part = part_of(backbone, "clip-lora", "image", lora_dropout=0.5)

    def seen(seed, at=slice(None)):
        now = Pass(torch.Generator().manual_seed(seed), 2, at)
        with torch.no_grad():
            return encode_image(backbone.visual, PIXELS[at], inside_of([part], "image", now))

    assert torch.equal(seen(1), seen(1))
    assert not torch.equal(seen(1), seen(2))
    second = slice(1, 2)  # as another process sees it
    torch.testing.assert_close(seen(1)[second], seen(1, second), atol=1e-5, rtol=1e-5)


def test_changes_and_prompts_go_together():
    backbone, *_ = made("Eva, rotations")
    part = part_of(backbone, "clip-lora", "image", lora_dropout=0.0)
    prompt = part_of(backbone, "vpt-deep", "image", visual_vectors=3)
    both = encode_image(backbone.visual, PIXELS, inside_of([part, prompt], "image"))
    alone = [encode_image(backbone.visual, PIXELS, inside_of([p], "image")) for p in (part, prompt)]
    assert all((both - one).norm() > 1e-3 for one in alone)
    both.sum().backward()
    assert all(p.grad.norm() > 0 for one in (part, prompt) for p in one.parameters())


# ---------------------------------------------------------------------------- models that read text


@pytest.mark.parametrize("method", ["clip-lora", "clip-svd"])
def test_a_siglip_is_changed_in_both_towers(method):
    backbone = siglip()
    visual, text = copy.deepcopy(backbone.visual), copy.deepcopy(backbone.text)
    own = {"lora_dropout": 0.0} if method == "clip-lora" else {}
    image = part_of(backbone, method, "image", **own)
    found = encode_image(backbone.visual, PIXELS, inside_of([image], "image"))
    places = [{n: f"trunk.{p.format(i)}" for n, p in BLOCK.items()} for i in range(12)]
    weights = changed(visual, places, image)
    compare(found, functional_call(visual, weights, (PIXELS,)), image)
    words = part_of(backbone, method, "text", **own)
    compare(*of_texts(backbone, text, words), words)


def of_texts(backbone, text, part):
    """Class features with a part in the text tower, and a copy's at weights changed by hand."""
    settings = make_settings({"dataset": "bundled", "method": "clip-lora"})
    classifier = new_classifier(backbone, NAMES, "a {}.", get_method("zero-shot"), settings)
    (encoder,) = classifier.text_encoders
    found = encoder(inside_of([part], "text"))
    at = "transformer.resblocks.{}."
    weights, block = {}, {("o",): "attn.out_proj", ("fc",): "mlp.c_fc", ("proj",): "mlp.c_proj"}
    layers = range(len(text.transformer.resblocks))
    places = [{n: at.format(i) + place for n, place in block.items()} for i in layers]
    weights = changed(text, places, part)
    for i in layers:
        whole = f"{at.format(i)}attn.in_proj_weight"
        rows = text.get_parameter(whole).detach().chunk(3)
        changes = [part.change(i, name) for name in "qkv"]
        weights[whole] = torch.cat([r + c for r, c in zip(rows, changes, strict=True)])
    ids = backbone.tokenizer([f"a {n}." for n in NAMES], context_length=backbone.context_length)
    return found, functional_call(text, weights, (ids,))


@pytest.mark.parametrize("changes", [
    {"text_cfg__embed_cls": True, "text_cfg__context_length": 30},
    {"text_cfg__no_causal_mask": True},
    {"vision_cfg__pool_type": "avg"},
    {"vision_cfg__attentional_pool": True, "vision_cfg__attn_pooler_heads": 2},
])  # fmt: skip
def test_ordinary_layers_may_stand_in_towers_that_are_not(changes):
    torch.manual_seed(5)
    model = CustomTextCLIP(**tiny_config(quick_gelu=False, **changes)).eval()
    visual, text = copy.deepcopy(model.visual), copy.deepcopy(model.text)
    tokenizer = SimpleTokenizer(context_length=model.text.context_length)
    seen = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    how = {"name": "odd", "device": torch.device("cpu"), "precision": "fp32"}
    backbone = Backbone(model, tokenizer, seen, **how)
    words = part_of(backbone, "clip-svd", "text")
    compare(*of_texts(backbone, text, words), words)
    image = part_of(backbone, "clip-lora", "image", lora_dropout=0.0, lora_maps=("o", "fc"))
    block = {("o",): "attn.out_proj", ("fc",): "mlp.c_fc"}
    layers = range(len(visual.transformer.resblocks))
    at = "transformer.resblocks.{}.{}"
    places = [{n: at.format(i, place) for n, place in block.items()} for i in layers]
    found = encode_image(backbone.visual, PIXELS, inside_of([image], "image"))
    compare(found, functional_call(visual, changed(visual, places, image), (PIXELS,)), image)


@pytest.mark.parametrize("method", ["clip-lora", "clip-svd"])
def test_a_run_on_a_siglip_is_evaluated_predicted_and_exported(
    tmp_path, photo_folder, letters, method
):
    pytest.importorskip("onnxruntime")
    make_folder(tmp_path / "siglip", "siglip")
    (tmp_path / "siglip" / "tokenizer.json").write_text('{"model": {}}')
    given = {"dataset": str(photo_folder), "backbone": str(tmp_path / "siglip"), "device": "cpu",
             "shots": 2, "batch_size": 3, "lr": 0.01, "steps": 3,
             "template": "a {}."}  # fmt: skip
    run = train(make_settings({**given, "method": method}), tmp_path / "run")
    _, result = evaluate_run(run, Target())
    assert result["accuracy"] == run.read_metrics().test.accuracy
    photos = sorted((photo_folder / "test").rglob("*.png"))[:4]
    assert len([*predict_each(load_classifier(run), photos, top=3)]) == 4
    assert export(run, tmp_path / "a.onnx", "onnx").difference < 1e-5


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("timm:test_resnet", "clip-lora", "image tower of 'timm:test_resnet/random', a ResNet of "
                                          "timm's, has others; .*auto, linear-probe"),
        ("timm:test_convnext", "clip-lora", "no linear map q; use --set lora_maps=fc,proj"),
        ("RN50", "clip-lora", "image tower of 'RN50/random', a ModifiedResNet, has others; .*coop"),
    ],
)  # fmt: skip
def test_a_tower_without_such_maps_is_refused(name, method, said):
    backbone = load_backbone(name, "random", device="cpu")
    with pytest.raises(UserError, match=said):
        part_of(backbone, method, "image")


def test_norms_of_timms_layers_are_not_learned():
    with pytest.raises(UserError, match="'siglip', a VisionTransformer of timm's, has others"):
        part_of(siglip(), "2sfs", "image")


def test_changes_of_an_mlp_have_no_place_in_published_files(tmp_path, photo_folder, tiny_weights):
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "device": "cpu",
             "shots": 2, "method": "clip-lora", "steps": 2, "lora_maps": "q,fc"}  # fmt: skip
    run = train(make_settings(given), tmp_path / "run")
    for form in (DASSL, "peft"):
        with pytest.raises(UserError, match="changes of fc have no place"):
            published_files(run, form)
