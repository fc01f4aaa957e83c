"""Training: adapters on the linear layers of a frozen model, saved so that converting them needs no option.

    from reparam_export.training import attach, save, trainable

    attach(model, "hydra", ["blocks.*.attn.proj", "blocks.*.mlp.fc2"], rank=8, scale=0.5, train="head")
    ...                                                    train it as any other nn.Module
    save(model, "ckpt.pt", base="timm:vit_base_patch16_224?pretrained=true")

The saved file names its base, and holds it where it exists nowhere else: ``reparam-export convert ckpt.pt --to onnx``.
"""

from reparam_export.training.attach import attach, save, trainable

__all__ = ["attach", "save", "trainable"]
