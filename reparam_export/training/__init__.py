"""Training: adapters on the linear layers of a frozen model, saved so that converting them needs no option.

    from reparam_export.training import attach, save

    attach(model, "hydra", "hydra-vit", rank=8, scale=0.5, train="head")
    ...                                                    train it as any other nn.Module
    save(model, "ckpt.pt", base="timm:vit_base_patch16_224?pretrained=true")

The saved file names its base, and holds it where it exists nowhere else: ``reparam-export convert ckpt.pt --to onnx``.

GLoRA's own way, all paths at once and then a search for the best one of each layer:

    net = supernet(model, rank=4, train="head")
    ...                                                    train net.model
    best = search(net.space, Fused(net, accuracy(batches)), folder="search").best
    save(net.fix(best).model, "ckpt.pt", base=...)
"""

from reparam_export.training.attach import Attached, adapter_parameters, attach, trainable
from reparam_export.training.evaluation import Fused, Unfused, accuracy
from reparam_export.training.saving import load, save
from reparam_export.training.search import Search, SearchResult, search
from reparam_export.training.space import Candidate, Space
from reparam_export.training.supernet import Supernet, load_supernet, supernet
from reparam_export.training.targets import PRESETS

__all__ = [
    "PRESETS",
    "Attached",
    "Candidate",
    "Fused",
    "Search",
    "SearchResult",
    "Space",
    "Supernet",
    "Unfused",
    "accuracy",
    "adapter_parameters",
    "attach",
    "load",
    "load_supernet",
    "save",
    "search",
    "supernet",
    "trainable",
]
