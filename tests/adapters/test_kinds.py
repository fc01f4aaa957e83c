"""Every kind against exact rational arithmetic of its paper's formula, and its two halves against each other."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reparam_export as rx
from reparam_export import plugins
from reparam_export.adapters import Step, fused, kind, low_rank, unfused
from reparam_export.affine import Affine, map_tensors, tensors_of, to_dtype
from reparam_export.checkpoints import NATIVE, Adapter
from reparam_export.checkpoints.native import to_plain
from reparam_export.rounding import round_once
from reparam_export.verification.weights import prove_layer

SIZES = [(5, 7), (7, 5), (6, 6), (1, 4), (12, 3)]
KINDS = plugins.names("adapters")


def even(name: str, out: int) -> int:
    """RoAd turns pairs of outputs."""
    return 2 * out if name == "road" else out


def base(out: int, inn: int, seed: int, *, bias: bool) -> Affine:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inn, generator=g, dtype=torch.float64).float().double()
    return Affine(weight, torch.randn(out, generator=g, dtype=torch.float64).float().double() if bias else None)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_fuse_is_apply(name: str, seed: int) -> None:
    out, inn = SIZES[seed % len(SIZES)]
    layer = base(even(name, out), inn, seed, bias=seed % 2 == 0 and name != "tokens")
    spec = kind(name)
    params = spec.example(seed, layer)
    x = torch.randn(4, 3, inn, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(spec.fuse(layer, params)(x), spec.apply(x, layer, params), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_shapes_name_every_tensor_of_an_example(name: str) -> None:
    for seed in range(12):
        out, inn = SIZES[seed % len(SIZES)]
        layer = base(even(name, out), inn, seed, bias=True)
        params = kind(name).example(seed, layer)
        found = {field: tuple(tensor.shape) for field, tensor in tensors_of(params).items()}
        assert found == kind(name).shapes(even(name, out), inn, params)
        assert all(bool((tensor != 0).all()) for tensor in tensors_of(params).values())


@pytest.mark.parametrize("name", [name for name in KINDS if name != "probed"])
def test_our_own_format_holds_every_kind(name: str, tmp_path: Path) -> None:
    for seed in range(6):
        out, inn = SIZES[seed % len(SIZES)]
        params = kind(name).example(seed, base(even(name, out), inn, seed, bias=True))
        entry = {"module": "fc", "kind": name, "rows": None, "params": to_plain(params)}
        torch.save({"format": NATIVE, "adapters": [entry]}, tmp_path / "ckpt.pt")
        (read,) = rx.read(tmp_path / "ckpt.pt").adapters
        again, given = tensors_of(read.params), tensors_of(params)
        assert again.keys() == given.keys()
        assert all(torch.equal(again[field], given[field]) for field in given)
        assert kind(name).describe(read.params) == kind(name).describe(params)


FACTORED = [name for name in KINDS if hasattr(kind(name), "low_rank")]


def test_the_kinds_that_are_folded_by_rows() -> None:
    assert {"lora", "hydra", "glora", "repadapter"} <= set(FACTORED)


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("seed", range(12))
def test_factors_fold_to_what_fuse_folds_to(name: str, seed: int) -> None:
    """In torch and in numpy, and with a base that only knows ``@``; what it shows on zeros says whether a bias is created."""
    from reparam_export.streaming.formats import F64
    from reparam_export.streaming.matrix import Mapped, Nothing

    out, inn = SIZES[seed % len(SIZES)]
    layer = base(out, inn, seed, bias=seed % 2 == 0)
    params = kind(name).example(seed, layer)
    expected = kind(name).fuse(layer, params)
    plain = low_rank(name, layer, params)
    assert plain is not None
    arrays = map_tensors(params, lambda t: t.numpy())
    bias = None if layer.bias is None else layer.bias.numpy()
    for transposed in (False, True):
        stored = np.ascontiguousarray(layer.weight.numpy().T) if transposed else layer.weight.numpy()
        form = low_rank(name, Affine(Mapped(stored, F64, transposed), bias), arrays)
        assert form is not None
        found = form.fold(Affine(layer.weight.numpy(), bias))
        for got, want in (
            (found.weight, expected.weight),
            (found.bias, expected.bias),
            (plain.fold(layer).weight, expected.weight),
        ):
            assert (got is None) == (want is None)
            if want is not None:
                np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    shown = low_rank(
        name, Affine(Nothing((out, inn)), bias), map_tensors(arrays, lambda t: np.broadcast_to(0.0, t.shape))
    )
    assert shown is not None
    assert (shown.bias is None) == (expected.bias is None)


def fractions(tensor: Any) -> Any:
    return np.vectorize(lambda v: Fraction(float(v)), otypes=[object])(tensor.numpy())


def exact_formula(name: str, layer: Affine, p: Any) -> tuple[Any, Any]:
    """The papers' formulas in rational arithmetic, written from FORMATS and the papers, not from the code under test."""
    W = fractions(layer.weight)  # noqa: N806
    b = fractions(layer.bias) if layer.bias is not None else np.full(W.shape[0], Fraction(0), dtype=object)
    if name == "lora":
        s = Fraction(p.scale)
        extra = fractions(p.pair.up.bias) if p.pair.up.bias is not None else 0 * b
        return W + s * (fractions(p.pair.up.weight) @ fractions(p.pair.down.weight)), b + s * extra
    if name == "hydra":
        weight, bias = W, b
        for branch, scale in ((p.parallel, p.parallel_scale), (p.sequential, p.sequential_scale)):
            if branch is None:
                continue
            s = Fraction(float(scale))
            up, down = fractions(branch.up.weight), fractions(branch.down.weight)
            shift = (
                up @ fractions(branch.down.bias) + fractions(branch.up.bias) if branch.up.bias is not None else 0 * b
            )
            if branch is p.parallel:
                weight, bias = weight + s * (up @ down), bias + s * shift
            else:
                weight, bias = weight + s * (up @ down @ W), bias + s * (up @ (down @ b) + shift)
        return weight, bias
    if name == "repadapter":
        s = Fraction(p.scale)
        up, down = fractions(p.pair.up.weight), fractions(p.pair.down.weight)
        shift = (
            up @ fractions(p.pair.down.bias) + fractions(p.pair.up.bias) if p.pair.up.bias is not None else 0 * up[:, 0]
        )
        return W + s * (W @ up @ down), b + s * (W @ shift)
    assert name == "glora"
    t = {field: fractions(tensor) for field, tensor in tensors_of(p).items()}

    def support(choice: str, d: Any, u: Any) -> Any:
        if choice.startswith("LoRA"):
            k = int(choice.split("_")[1])
            return d[:, :k] @ u[:k]
        return {"vector": d[:, :1], "constant": d[0, 0], "none": Fraction(0)}[choice]

    def vector(choice: str, v: Any) -> Any:
        return {"vector": v, "constant": v[0], "none": Fraction(0)}[choice]

    weight = W + W * support(p.path.A, t["Ad"], t["Au"]) + support(p.path.B, t["Bd"], t["Bu"])
    c = support(p.path.C, t["Cd"], t["Cu"])
    shift = (W @ c)[:, 0] if p.path.C != "none" else 0 * b
    return weight, b + b * vector(p.path.D, t["D"]) + vector(p.path.E, t["E"]) + shift


@pytest.mark.parametrize("name", ["hydra", "glora", "lora", "repadapter"])
@pytest.mark.parametrize("seed", range(10))
def test_fused_weights_are_the_papers_formula_rounded_once(name: str, seed: int) -> None:
    out, inn = SIZES[seed % len(SIZES)]
    layer = base(out, inn, seed, bias=seed % 3 != 1)
    params = map_tensors(kind(name).example(seed, layer), lambda t: t.float().double())
    fused = kind(name).fuse(layer, params)
    weight, bias = exact_formula(name, layer, params)
    rounded = np.vectorize(lambda v: np.float32(float(v)))  # float() of a Fraction is correctly rounded
    assert np.array_equal(fused.weight.float().numpy(), rounded(weight))
    found = torch.zeros(out) if fused.bias is None else fused.bias.float()
    assert np.array_equal(found.numpy(), rounded(bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("tokens", "probed")])
def test_clean_adapters_never_fail(name: str, dtype: torch.dtype) -> None:
    for seed in range(17):
        torch.manual_seed(seed)
        out, inn = SIZES[seed % len(SIZES)]
        module = torch.nn.Linear(inn, even(name, out), bias=seed % 2 == 0)
        layer = Affine(module.weight.detach().double(), None if module.bias is None else module.bias.detach().double())
        params = to_dtype(kind(name).example(seed, layer), torch.float32)
        fused = kind(name).fuse(layer, to_dtype(params, torch.float64))
        tensors = {"layer.weight": round_once(fused.weight, dtype)}
        if fused.bias is not None:
            tensors["layer.bias"] = round_once(fused.bias, dtype)
        for limit in (2**35, 0):  # read out, and probed
            evidence = prove_layer(module, Adapter("layer", name, params), tensors, seed=seed, limit=limit)
            assert evidence.verdict == "exact", (seed, limit, evidence)


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("tokens", "probed")])
def test_clean_stacks_never_fail(name: str) -> None:
    """A kind between one that adds to the weight and one that reads all of it, each with a weight of its own."""
    for seed in range(8):
        out, inn = SIZES[seed % len(SIZES)]
        out = even(name, out)
        module = torch.nn.Linear(inn, out, bias=seed % 2 == 0)
        layer = Affine(module.weight.detach().double(), None if module.bias is None else module.bias.detach().double())
        names = (("lora", name, "dora"), ("dora", name), (name, "hydra"), (name, name))[seed % 4]
        stack = [
            (n, to_dtype(kind(n).example(seed + i, layer), torch.float32), (1.0, 0.5, -2.0)[i])
            for i, n in enumerate(names)
        ]
        steps = [Step(kind(n), to_dtype(p, torch.float64), weight=w) for n, p, w in stack]
        folded = fused(layer, steps)
        x = torch.randn(3, inn, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(folded(x), unfused(layer, steps)(x), rtol=1e-10, atol=1e-10)
        tensors = {"layer.weight": folded.weight.float()}
        if folded.bias is not None:
            tensors["layer.bias"] = folded.bias.float()
        adapters = [Adapter("layer", n, p, weight=w) for n, p, w in stack]
        for limit in (2**35, 0):
            evidence = prove_layer(module, adapters, tensors, seed=seed, limit=limit)
            assert evidence.verdict == "exact", (seed, limit, evidence)
            broken = tensors | {"layer.weight": tensors["layer.weight"] * (1 + 1e-5)}
            assert prove_layer(module, adapters, broken, seed=seed, limit=limit).verdict == "wrong"
