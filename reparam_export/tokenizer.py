"""The tokenizer that goes with a fused model: that of the adapter's own folder where it has one, else the base's.

Training scripts save the tokenizer beside the adapter: with tokens that they added, with the chat template that was trained for. A whole
tokenizer there (one with its vocabulary) takes the place of all of the base's tokenizer files; a chat template alone that of the base's.
"""

from __future__ import annotations

from pathlib import Path

from reparam_export.checkpoints import Checkpoint
from reparam_export.hf_folder import carried, folder_of

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
)  # fmt: skip
TEMPLATES = ("chat_template.jinja", "chat_template.json")
FILES = frozenset(
    (
        *VOCABULARIES, *TEMPLATES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
        "source.spm", "target.spm", "normalizer.json",
    )
)  # fmt: skip


def beside_weights(source: Path, checkpoint: Checkpoint) -> list[Path]:
    """config, generation and tokenizer files of the base's folder, with the adapter's own tokenizer in the place of the base's."""
    own = {file.name: file for file in _own(checkpoint)}
    whole = any(name in own for name in VOCABULARIES)
    dropped = FILES if whole else frozenset(TEMPLATES) if any(name in own for name in TEMPLATES) else frozenset()
    kept = {file.name: file for file in carried(source) if file.name not in dropped}
    own = own if whole else {name: file for name, file in own.items() if name in TEMPLATES}
    return list((kept | own).values())


def own_tokenizer(source: Path, checkpoint: Checkpoint) -> list[str]:
    """The names of the adapter's own tokenizer files that are taken and are not the base's, byte for byte."""
    taken = [file for file in beside_weights(source, checkpoint) if file.parent != source]
    bases = {file.name: file for file in carried(source)}
    return [f.name for f in taken if f.name not in bases or f.read_bytes() != bases[f.name].read_bytes()]


def of_tokenizer(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """What an artefact records of it; nothing where the tokenizer is the base's."""
    source = folder_of(checkpoint.base)
    names = [] if source is None else own_tokenizer(source, checkpoint)
    return {"tokenizer": names} if names else {}


def _own(checkpoint: Checkpoint) -> list[Path]:
    """The tokenizer files in the folder of the adapter; of a stack, in the last that has any."""
    for member in reversed(checkpoint.members or (checkpoint,)):
        folder = member.path if member.path.is_dir() else member.path.parent
        found = (
            [file for file in carried(folder) if file.name in FILES]
            if (folder / "adapter_config.json").is_file()
            else []
        )
        if found:
            return found
    return []
