"""Backbones give what transformers makes of the same files; skipped where it is not installed."""

import pytest
import torch
from theirs import KINDS, VISION, alike, features, make_folder

from dapt.clip.sources import load_backbone

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", KINDS)
def test_towers_give_what_transformers_gives(tmp_path, kind, letters):
    transformers = pytest.importorskip("transformers")
    make_folder(tmp_path, kind)
    if not kind.startswith("clip"):
        (tmp_path / "tokenizer.json").write_text("{}")
    pixels, ids, image, text = features(load_backbone(str(tmp_path)))
    model = transformers.AutoModel.from_pretrained(str(tmp_path)).eval()
    given = {"pixel_values": pixels}
    if kind == "siglip2":
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
        given = {"pixel_values": patches.flatten(3).flatten(1, 2),
                 "pixel_attention_mask": torch.ones(3, 16, dtype=torch.long),
                 "spatial_shapes": torch.tensor([[4, 4]] * 3)}  # fmt: skip
    with torch.no_grad():
        theirs = model(input_ids=ids, **given)
    alike(image, theirs.image_embeds)
    alike(text, theirs.text_embeds)


def test_chinese_clip_gives_what_transformers_gives(tmp_path, letters):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 64, "vocab_size": 90, "pad_token_id": 1}  # fmt: skip
    config = transformers.ChineseCLIPConfig(
        text_config=small, vision_config=VISION, projection_dim=24
    )
    model = transformers.ChineseCLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    pixels, ids, image, text = features(load_backbone(str(tmp_path)))
    with torch.no_grad():
        mask = (ids != 1).long()
        theirs = model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    alike(image, theirs.image_embeds)
    alike(text, theirs.text_embeds)
