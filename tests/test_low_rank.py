"""Changes of weights in image towers of timm's and in odd ones of open_clip's, against references.

A reference is a copy of the model, made before it became a backbone, run by its own forward at
weights that are changed by hand.
"""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from miniatures import tiny_config
from open_clip import SimpleTokenizer
from open_clip.factory import _MODEL_CONFIGS
from open_clip.hf_model import HFTextEncoder, MeanPooler
from open_clip.model import CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from test_architectures import LetterTokenizer
from test_towers import siglip
from theirs import make_folder
from torch import nn
from torch.func import functional_call

from dapt.clip.backbone import Backbone, Preprocessing
from dapt.clip.image import encode_image
from dapt.clip.image_only import ImageOnly, ImageTower
from dapt.clip.inside import Pass
from dapt.clip.sources import load_backbone
from dapt.clip.text import ClassTokens, TextEncoder
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


# --------------------------------------------------------- ResNets, and text towers of transformers


def with_tower(visual=None, text=None, tokenizer=None):
    """A small backbone with another tower."""
    model = CustomTextCLIP(**tiny_config(embed_dim=24)).eval()
    model.visual, model.text = visual or model.visual, text or model.text
    seen = Preprocessing(32, (0.5,) * 3, (0.5,) * 3)
    how = {"name": "other", "device": torch.device("cpu"), "precision": "fp32"}
    return Backbone(model, tokenizer or SimpleTokenizer(), seen, **how)


def small_resnet():
    torch.manual_seed(7)
    return ModifiedResNet((1, 1, 1, 1), output_dim=24, heads=4, image_size=64, width=8).eval()


@pytest.mark.parametrize("method", ["clip-lora", "clip-svd"])
def test_a_resnet_is_changed_in_its_attention_pooling(method):
    backbone, pixels = with_tower(small_resnet()), torch.randn(2, 3, 64, 64)
    own = {"clip-lora": {"lora_maps": tuple("qkvo"), "lora_dropout": 0.0},
           "clip-svd": {"svd_maps": tuple("qkvo")}}[method]  # fmt: skip
    part, reference = part_of(backbone, method, "image", **own), copy.deepcopy(backbone.visual)
    ways = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "c_proj"}
    places = [{(name,): f"attnpool.{way}" for name, way in ways.items()}]
    found = encode_image(backbone.visual, pixels, inside_of([part], "image"))
    weights = changed(reference, places, part)
    compare(found, functional_call(reference, weights, (pixels,)), part)
    assert torch.equal(encode_image(backbone.visual, pixels), reference(pixels))  # as it was


class TextLayer(nn.Module):
    """A layer of some encoder: its linear maps are where ``places`` says."""

    def __init__(self, places):
        super().__init__()
        self.places, sizes = places, {"fc": (24, 48), "proj": (48, 24)}
        for name, place in places.items():
            *way, last = place.split(".")
            at = self
            for part in way:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at._modules[part]
            at.add_module(last, nn.Linear(*sizes.get(name, (24, 24))))

    def forward(self, x, mask):
        of = {name: self.get_submodule(place) for name, place in self.places.items()}
        q, k, v = (of[name](x).unflatten(-1, (2, 12)).transpose(1, 2) for name in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + of["o"](mixed.transpose(1, 2).flatten(2))
        return x + of["proj"](of["fc"](x).tanh()) if "fc" in of else x.tanh()


class TextLayers(nn.Module):
    """What transformers' encoders do, in two layers."""

    def __init__(self, places):
        super().__init__()
        self.words, self.encoder = nn.Embedding(100, 24), nn.Module()
        self.encoder.layer = nn.ModuleList([TextLayer(places), TextLayer(places)])

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.encoder.layer:
            x = layer(x, (attention_mask == 1)[:, None, None])
        return SimpleNamespace(last_hidden_state=x)


OF_BERT = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "fc": "intermediate.dense",
    "proj": "output.dense",
}
OF_M2M = {**{n: f"self_attn.{n}_proj" for n in "qkv"}, "o": "self_attn.out_proj", "fc": "fc1",
          "proj": "fc2"}  # fmt: skip
OF_T5 = {n: f"layer.0.SelfAttention.{n}" for n in "qkvo"}


@pytest.mark.parametrize("maps", [OF_BERT, OF_M2M, OF_T5])
def test_text_towers_of_transformers_are_changed_in_their_layers(maps):
    torch.manual_seed(8)
    text = HFTextEncoder.__new__(HFTextEncoder)
    nn.Module.__init__(text)
    text.config, text.output_tokens = SimpleNamespace(pad_token_id=2), False
    text.vocab_size, text.context_length = 100, 514
    text.transformer, text.pooler = TextLayers(maps), MeanPooler()
    text.proj = nn.Linear(24, 24, bias=False)
    backbone = with_tower(text=text, tokenizer=LetterTokenizer(40, (0,), (1,), 2))
    text = copy.deepcopy(text)
    part = part_of(backbone, "clip-lora", "text", lora_maps=tuple(maps), lora_dropout=0.0)
    places = [{(n,): f"transformer.encoder.layer.{i}.{place}" for n, place in maps.items()}
              for i in range(2)]  # fmt: skip
    encoder = TextEncoder(backbone, ClassTokens.for_template(backbone, NAMES, "a {}."))
    found = encoder(inside_of([part], "text"))
    ids = backbone.tokenizer([f"a {name}." for name in NAMES])
    compare(found, functional_call(text, changed(text, places, part), (ids,)), part)
    torch.testing.assert_close(encoder(), text(ids), atol=1e-5, rtol=1e-5)  # as it was
    # Beside a context of embeddings.
    prompt = part_of(backbone, "coop", "text", text_vectors=2)
    encoder = TextEncoder(backbone, ClassTokens.for_context(backbone, NAMES, 2))
    both = encoder(inside_of([part, prompt], "text"))
    both.sum().backward()
    assert all(p.grad.norm() > 0 for one in (part, prompt) for p in one.parameters())


LAST = {
    "ResNet": lambda: small_resnet(),
    "head": lambda: TimmModel("test_vit", 24, image_size=64, pool="token", proj="linear"),
    "MLP in the head": lambda: TimmModel("test_vit", 24, image_size=64, pool="avg", proj="mlp"),
    "bias": lambda: TimmModel("test_vit", 24, image_size=64, pool="", proj="linear",
                              proj_bias=True),
    "trunk": lambda: TimmModel("test_vit", 24, image_size=64, pool="token", proj=""),
    "trunk's own head": lambda: TimmModel("test_convnext", 24, image_size=64, pool="avg", proj=""),
}  # fmt: skip


@pytest.mark.parametrize("name", LAST)
def test_a_linear_map_at_the_end_is_a_projection(name, photo_folder):
    torch.manual_seed(9)
    backbone = with_tower(LAST[name]().eval())
    with torch.no_grad():  # biases too
        for parameter in backbone.visual.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    pixels = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.visual(pixels)
        before = encode_image(backbone.visual, pixels, projected=False)
    assert before.shape[1] == len(backbone.projection)
    torch.testing.assert_close(before @ backbone.projection, expected, atol=1e-5, rtol=1e-5)
    if name in ("head", "ResNet"):  # with what is put inside
        part = part_of(backbone, "clip-lora", "image", lora_dropout=0.0)
        ways = [encode_image(backbone.visual, pixels, inside_of([part], "image"), projected=p)
                for p in (False, True)]  # fmt: skip
        assert (ways[1] - expected).norm() > 1e-3
        torch.testing.assert_close(ways[0] @ backbone.projection, ways[1], atol=1e-5, rtol=1e-5)


def test_a_projection_of_a_resnet_is_tuned_and_exported(tmp_path, photo_folder, monkeypatch):
    pytest.importorskip("onnxruntime")
    vision = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 64}
    monkeypatch.setitem(_MODEL_CONFIGS, "small", tiny_config(vision_cfg=vision))
    given = {"dataset": str(photo_folder), "backbone": "small", "pretrained": "random", "shots": 2,
             "device": "cpu", "method": "prolip", "prolip_steps": 3, "prolip_views": 1}  # fmt: skip
    run = train(make_settings(given), tmp_path / "run")
    _, result = evaluate_run(run, Target())
    assert result["accuracy"] == run.read_metrics().test.accuracy
    assert export(run, tmp_path / "a.onnx", "onnx").difference < 1e-5


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("timm:test_resnet", "clip-lora", "image tower of 'timm:test_resnet/random', a ResNet of "
                                          "timm's, has others; .*auto, linear-probe"),
        ("timm:test_convnext", "clip-lora", "no linear map q; use --set lora_maps=fc,proj"),
        ("RN50", "2sfs", "image tower of 'RN50/random', a ModifiedResNet, has others; .*coop"),
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
