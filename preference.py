"""Rewards learned from people: HPSv2, PickScore, ImageReward and LAION's aesthetic score, from the user's files.

Each is a large CLIP or BLIP that scores an image, mostly with its prompt; a video is worth the mean of its frames.
Nothing is fetched and no code in a file is run. What each model's own preprocessing does to a picture is done here to
a tensor, so that the score has a gradient; it differs from theirs by their rounding to 8 bits alone.

Each maker of a score takes (its file or folder, device) and returns score(video (B, 3, F, H, W), prompts) -> (B,),
or the two functions whose product the score is; rewards.py makes rewards of them. Raises UserError for files that are
missing or hold something else.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as v2

from common import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _prepare(images, size, pad):
    """Images (N, 3, H, W) in [0, 1] to a network's normalised square input (N, 3, size, size).

    pad: the longest side becomes `size`, and black fills the rest before normalising (HPSv2). Otherwise the shortest
    side becomes `size`, and the middle is cut out (CLIP).
    """
    h, w = images.shape[-2:]
    scale = size / (max(h, w) if pad else min(h, w))
    h, w = (round(h * scale), round(w * scale)) if pad else (int(h * scale + 1e-6), int(w * scale + 1e-6))
    x = v2.resize(images, [h, w], v2.InterpolationMode.BICUBIC, antialias=True)
    if not pad:  # CLIP resizes 8-bit pictures, where what bicubic overshoots is cut off
        x = x.clamp(0, 1)
    # int, since both round the margin down; center_crop would round it to the even number
    x = v2.crop(x, int((h - size) / 2), int((w - size) / 2), size, size)
    return v2.normalize(x, CLIP_MEAN, CLIP_STD)


def _mean_over_frames(video, size, pad, score):
    """score(prepared images (n, 3, size, size), index of each one's clip (n,)) -> (n, ...), averaged over frames."""
    images = ((video.transpose(1, 2).flatten(0, 1) + 1) / 2).clamp(0, 1)  # (B F, 3, H, W)
    clip = torch.arange(len(video), device=video.device).repeat_interleave(video.shape[2])
    parts = zip(images.split(32), clip.split(32))  # all at once would not fit beside a ViT-H
    return torch.cat([score(_prepare(x, size, pad), i) for x, i in parts]).unflatten(0, (len(video), -1)).mean(1)


def cosine(encode_image, encode_text, size, pad, context, device):
    """The two sides of cos(image, text), without CLIP's temperature, as the paper reports HPSv2 and PickScore.

    -> parts(video) (B, D), the mean of the frames' unit embeddings, and direction(prompts) (B, D), the text's: their
    product is the mean of the frames' cosines.
    """
    from open_clip import SimpleTokenizer

    tokens = SimpleTokenizer(context_length=context)  # CLIP's words are the same in every implementation

    def parts(video):
        return _mean_over_frames(video, size, pad, lambda x, clip: F.normalize(encode_image(x), dim=-1))

    def direction(prompts):
        return F.normalize(encode_text(tokens(prompts).to(device)), dim=-1)

    return parts, direction


def _tensors(file):
    """The state dict in a .safetensors or torch file; never runs code from it."""
    try:
        if Path(file).suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return tensors.get("state_dict", tensors)
    except Exception as e:  # the readers raise many kinds, none of which says more to a user
        raise UserError(f"cannot read weights from {file}: missing, cut short or foreign ({type(e).__name__})") from e


def _fill(module, tensors, file, device):
    try:
        module.load_state_dict(tensors)
    except RuntimeError as e:
        raise UserError(f"{file} holds other weights than expected: {' '.join(str(e).split())[:200]}") from None
    return module.to(device).eval().requires_grad_(False)


def hpsv2(file, device):
    """HPSv2 (arXiv:2306.09341): a CLIP ViT-H-14; versions 2.0 and 2.1 differ in their weights alone."""
    import open_clip

    tensors = _tensors(file)  # a wrong file is found before the network is made, which takes long
    model = _fill(open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")), tensors, file, device)
    size, context = model.visual.image_size[0], model.context_length
    return cosine(model.encode_image, model.encode_text, size, True, context, device)


def _clip_folder(folder, device):
    """transformers' CLIPModel in a folder -> (encode_image, encode_text, image size, text length)."""
    from transformers import CLIPModel

    try:
        if json.loads((Path(folder) / "config.json").read_text())["model_type"] != "clip":
            raise ValueError("its config.json is not that of a CLIP model")
        how = {"local_files_only": True, "output_loading_info": True, "dtype": torch.float32}
        model, info = CLIPModel.from_pretrained(folder, **how)
        if info["missing_keys"]:  # transformers would leave them random and go on
            raise ValueError(f"it lacks {sorted(info['missing_keys'])[0]}")
    except Exception as e:
        raise UserError(f"{folder} is no folder of a CLIPModel: {' '.join(str(e).split())[:200]}") from e
    model.to(device).eval().requires_grad_(False)
    embedding = lambda out: getattr(out, "pooler_output", out)  # a tensor in transformers 4, an output object in 5
    image = lambda x: embedding(model.get_image_features(pixel_values=x))
    text = lambda tokens: embedding(model.get_text_features(input_ids=tokens))
    return image, text, model.config.vision_config.image_size, model.config.text_config.max_position_embeddings


def pickscore(folder, device):
    """PickScore v1 (arXiv:2305.01569): a CLIP ViT-H-14."""
    image, text, size, context = _clip_folder(folder, device)
    return cosine(image, text, size, False, context, device)


def _affine(x, tensors, prefix):
    """The five layers of LAION's and ImageReward's heads: dropout between them, and no nonlinearity at all."""
    for i in (0, 2, 4, 6, 7):
        x = F.linear(x, tensors[f"{prefix}{i}.weight"], tensors[f"{prefix}{i}.bias"])
    return x.squeeze(-1)


def aesthetic(folder, device):
    """LAION's improved aesthetic predictor (v2), as in DDPO: five linear layers on normalised CLIP features."""
    encode, _, size, _ = _clip_folder(folder, device)
    file = Path(folder) / "sac+logos+ava1-l14-linearMSE.pth"
    head = {key: value.float().to(device) for key, value in _tensors(file).items()}

    def score(video, prompts):
        of_images = lambda x, clip: _affine(F.normalize(encode(x), dim=-1), head, "layers.")
        return _mean_over_frames(video, size, False, of_images)

    return score


# BLIP's names for the parts of its image encoder, and transformers' own
BLIP_KEYS = {
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^blocks\.": "encoder.layers.",
    r"\.norm": ".layer_norm",
    r"^norm\.": "post_layernorm.",
    r"\.attn\.": ".self_attn.",
    r"attn\.proj\.": "attn.projection.",
}


def imagereward(folder, device):
    """ImageReward v1.0 (arXiv:2304.05977): a BLIP that reads the prompt while looking at the image, and a linear head.

    Its own package needs a transformers of years ago, so the BLIP is transformers' own, with the keys renamed.
    """
    from transformers import BertTokenizerFast, BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    folder, file = Path(folder), Path(folder) / "ImageReward.pt"
    tensors = {k: v.float() for k, v in _tensors(file).items() if "position_ids" not in k}
    take = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    vision, text, head = take("blip.visual_encoder."), take("blip.text_encoder."), take("mlp.layers.")
    try:
        width, _, _, patch = vision["patch_embed.proj.weight"].shape
        size = patch * round((vision["pos_embed"].shape[1] - 1) ** 0.5)
        depth = sum(k.endswith("attn.qkv.weight") for k in vision)
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
        sizes |= {"intermediate_size": 4 * width, "image_size": size, "patch_size": patch, "layer_norm_eps": 1e-6}
        viewer = BlipVisionModel(BlipVisionConfig(**sizes))
        config = json.loads((folder / "med_config.json").read_text())
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        names += ["max_position_embeddings", "vocab_size"]
        config = BlipTextConfig(**{k: config[k] for k in names}, encoder_hidden_size=width)
        reader = BlipTextModel(config, add_pooling_layer=False)
        if not (folder / "vocab.txt").is_file():
            raise OSError("vocab.txt, the words of bert-base-uncased, is not there")
        tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (KeyError, OSError, ValueError) as e:
        raise UserError(f"{folder} is no ImageReward folder (ImageReward.pt, med_config.json, vocab.txt): {e}") from e
    for old, new in BLIP_KEYS.items():
        vision = {re.sub(old, new, k): v for k, v in vision.items()}
    _fill(viewer, vision, file, device), _fill(reader, text, file, device)
    head = {k: v.to(device) for k, v in head.items()}

    def score(video, prompts):
        how = {"padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt"}
        tokens = tokenizer(prompts, **how).to(device)

        def of_images(x, clip):
            seen = viewer(pixel_values=x).last_hidden_state
            ids, mask = tokens.input_ids[clip], tokens.attention_mask[clip]
            out = reader(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[:, 0]
            return (_affine(out, head, "") - 0.16717362830052426) / 1.0333394966054072

        return _mean_over_frames(video, size, False, of_images)

    return score
