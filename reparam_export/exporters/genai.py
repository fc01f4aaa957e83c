"""onnxruntime-genai: a decoder with KV cache, made by its own builder from the fused Hugging Face folder, and generating text here.

    genai/            model.onnx, genai_config.json, tokenizer

Before it counts, the model is run twice over: its logits at every position of the reference's samples, by onnxruntime with an empty
cache; and greedy generation with the cache, by onnxruntime-genai, token by token against the unfused torch model. Where the two choose
different tokens, the float64 reference must hold both to be equally good, to within the bound of the logits; else it is refused.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reparam_export.errors import EquivalenceError, ExportError, MissingBackendError, UsageError
from reparam_export.exporters._greedy import NEW_TOKENS, PROMPTS, Divergence, divergence, end_tokens, ended, greedy
from reparam_export.exporters.artifact import Artifact
from reparam_export.files import remove, sha256
from reparam_export.tokenizer import of_tokenizer
from reparam_export.verification.certificate import OutputEvidence
from reparam_export.verification.outputs import Reference, compare

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from reparam_export.verification import VerifiedModel


def check(precision: str) -> None:
    """Raises MissingBackendError without the packages, UsageError for a precision that cannot be run here."""
    for package in ("onnxruntime_genai", "transformers"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingBackendError(
                f"the target genai needs the package {package.replace('_', '-')}, which cannot be imported; "
                "pip install 'reparam-export[genai]'",
                package=package,
                extra="genai",
            ) from error
    if precision != "fp32":
        raise UsageError(
            f"--precision {precision}: onnxruntime-genai's CPU models are fp32, and what cannot be run here is not handed over"
        )


def write(source: Path, path: Path, cache: Path) -> None:
    """Let onnxruntime-genai's builder make ``path`` from a Hugging Face folder. Raises ExportError with what the builder said."""
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        source,
        "-o",
        path,
        "-p",
        "fp32",
        "-e",
        "cpu",
        "-c",
        cache,
    ]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    made = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=offline)
    if made.returncode != 0 or not (path / "genai_config.json").is_file():
        said = [line for line in made.stderr.splitlines() if line.strip()]
        raise ExportError(
            f"onnxruntime-genai's builder does not take this model: {said[-1].rstrip('.;') if said else f'exit code {made.returncode}'}; "
            "it needs a decoder that it knows, with its tokenizer in the base's folder"
        )


class Runner:
    """One genai folder, as a context manager: ``logits`` of whole sequences, and greedy ``generate`` with the KV cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session: Any = None
        self._model: Any = None

    def __enter__(self) -> Runner:
        import onnxruntime_genai as genai

        from reparam_export.exporters.onnx import session

        self._session = session(self.path / "model.onnx", self.path)
        try:
            self._model = genai.Model(str(self.path))
        except Exception as error:  # its exception classes are not public
            raise ExportError(f"onnxruntime-genai cannot load {self.path.name}: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._session = self._model = None

    def logits(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """ids (batch, sequence) int64 -> (batch, sequence, vocabulary), every position, from an empty cache. Raises ExportError."""
        import numpy as np

        feed: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for given in self._session.get_inputs():
            if given.name == "position_ids":
                feed[given.name] = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
            elif given.name not in feed:
                heads, size = given.shape[1], self._head_size()
                feed[given.name] = np.zeros((len(ids), heads, 0, size), np.float32)
        try:
            found: np.ndarray[Any, Any] = self._session.run(["logits"], feed)[0]
        except Exception as error:  # onnxruntime's exception classes are not public
            raise ExportError(f"{self.path.name}: onnxruntime failed to run it: {error}") from error
        return found

    def generate(self, ids: Sequence[int], count: int) -> list[int]:
        """The next ``count`` tokens, fewer when the model ends. Raises ExportError."""
        import numpy as np
        import onnxruntime_genai as genai

        try:
            settings = genai.GeneratorParams(self._model)
            settings.set_search_options(max_length=len(ids) + count, do_sample=False)
            generator = genai.Generator(self._model, settings)
            generator.append_tokens(np.array(ids, np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            return [int(token) for token in generator.get_sequence(0)[len(ids) :]]
        except Exception as error:
            raise ExportError(f"{self.path.name}: onnxruntime-genai failed to generate: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The ids that its own tokenizer gives."""
        import onnxruntime_genai as genai

        return [int(token) for token in genai.Tokenizer(self._model).encode(text)]

    @property
    def context(self) -> int:
        """How many tokens the model was made for."""
        return int(self._config()["context_length"])

    def _head_size(self) -> int:
        return int(self._config()["decoder"]["head_size"])

    def _config(self) -> dict[str, Any]:
        from reparam_export.files import read_json

        content: dict[str, Any] = read_json(self.path / "genai_config.json")["model"]
        return content


def export_genai(model: VerifiedModel, folder: Path, precision: str = "fp32") -> Artifact:
    """Build ``genai`` below ``folder`` and prove it. Raises ExportError, EquivalenceError (nothing is kept)."""
    check(precision)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch:
        source = _hugging_face(model, folder, Path(scratch))
        made = Path(scratch) / "genai"
        write(source, made, Path(scratch) / "cache")
        with Runner(made) as runner:
            evidence = logits_evidence(model, runner)
            bad = next((o for o in evidence if not o.passed), None)
            if bad is not None:
                raise EquivalenceError(
                    f"genai: its logits at batch {bad.batch} are off by {bad.error:.3g}, bound {bad.bound:.3g}; it was not kept"
                )
            details = generation(model, runner, source, 2 * max(o.bound for o in evidence))
            details |= of_tokenizer(model.checkpoint)
        target = folder / "genai"
        remove(target)
        made.replace(target)
    return Artifact(
        target="genai",
        path="genai",
        precision=precision,
        size=sum(f.stat().st_size for f in target.iterdir()),
        sha256=sha256(target),
        weights_sha256=model.certificate.weights_sha256,
        ran=True,
        note=f"generated {NEW_TOKENS} tokens greedily by onnxruntime-genai on the CPU, with its cache: {details['same tokens']} prompts "
        "give the unfused torch model's tokens"
        + ("; where they part, the two are equally good" if details["divergences"] else "")
        + ("; with the tokenizer of the adapter's folder, which is not the base's" if "tokenizer" in details else ""),
        outputs=evidence,
        details={**details, "seconds": round(time.perf_counter() - started, 2)},
    )


def _hugging_face(model: VerifiedModel, folder: Path, scratch: Path) -> Path:
    """The fused folder: the one that ``fuse`` streamed, or one written now."""
    from reparam_export.exporters.safetensors import export_folder, is_streamed
    from reparam_export.hf_folder import folder_of

    if folder_of(model.checkpoint.base) is None:
        raise ExportError("the target genai needs a base that is a Hugging Face folder (hf:FOLDER)")
    if is_streamed(folder):
        return folder / "hf"
    export_folder(model, scratch)
    return scratch / "hf"


def logits_evidence(model: VerifiedModel, runner: Runner) -> tuple[OutputEvidence, ...]:
    """Logits against the reference at batch 1 and 2: samples without padding, which a decoder's cache does not see."""
    import torch

    from reparam_export.exporters import stored_reference

    references = [("genai fp32", model.reference)]
    if model.reference.dtype != "float32":
        references.append(("genai fp32 against the stored weights", stored_reference(model)))
    evidence: list[OutputEvidence] = []
    for name, reference in references:
        whole = without_padding(reference)

        def run_batch(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            return [torch.from_numpy(runner.logits(inputs["input_ids"].numpy()))]

        for batch in (1, 2):
            evidence += compare(name, run_batch, whole, batch)
    return tuple(evidence)


def without_padding(reference: Reference) -> Reference:
    """The samples whose attention mask is all ones, and their logits. Raises ExportError when there is none."""
    import torch

    if "logits" not in reference.outputs or "input_ids" not in reference.inputs:
        raise ExportError("the target genai needs a model from input_ids to logits")
    mask = reference.inputs.get("attention_mask")
    chosen = torch.arange(reference.samples) if mask is None else torch.nonzero(mask.bool().all(dim=1)).flatten()
    if not len(chosen):
        raise ExportError("every sample of the proof is padded; verify with samples without padding among them")
    inputs = {name: tensor[chosen] for name, tensor in reference.inputs.items()}
    return replace(reference, inputs=inputs, outputs={"logits": reference.outputs["logits"][chosen]})


def generation(model: VerifiedModel, runner: Runner, source: Path, bound: float) -> dict[str, Any]:
    """Greedy tokens with the cache against the unfused torch model.

    Raises EquivalenceError for a difference that rounding does not explain.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    unfused = model.unfused(torch.float32)
    ends = end_tokens(unfused)
    parted: list[Divergence] = []
    alike = tokens = 0
    for prompt in PROMPTS:
        ids = [int(i) for i in tokenizer(prompt)["input_ids"]]
        alike += runner.encode(prompt) == ids
        ids = ids[: max(1, runner.context - NEW_TOKENS)]
        expected, found = (
            ended(tokens, NEW_TOKENS, ends)
            for tokens in (greedy(unfused, ids, NEW_TOKENS, ends), runner.generate(ids, NEW_TOKENS))
        )
        tokens += len(expected)
        if expected != found:
            parted.append(divergence(model, prompt, ids, (expected, found), bound))
    wrong = next((d for d in parted if not d.explained), None)
    if wrong is not None:
        raise EquivalenceError(f"genai: generates another text than the unfused model: {wrong}; it was not kept")
    return {
        "prompts": len(PROMPTS),
        "tokens compared": tokens,
        "same tokens": f"{len(PROMPTS) - len(parted)} of {len(PROMPTS)}",
        "divergences": [str(d) for d in parted],
        "prompts tokenized alike": f"{alike} of {len(PROMPTS)}",
    }
