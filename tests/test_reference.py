"""The Python references against tables checked by hand, a second formula, and finite
differences."""

import numpy as np
import oracle
import pytest
import test_matrix_memory_references as matrices
import torch
from cases import ALL, DIRECT, MATRICES, close, gradients, over

BY_NAME = {case.name: case for case in DIRECT}


def test_every_operator_has_a_table_and_a_formula():
    assert set(BY_NAME) == oracle.FORMULAS
    assert {table.operator for table in oracle.TABLES} == set(BY_NAME)
    names = {case.name for case in MATRICES}  # have theirs in a file of their own
    assert {table.memory.reference.__name__ for table in matrices.TABLES} == {
        name + "_reference" for name in names
    }
    assert {memory.reference.__name__ for memory in matrices.MEMORIES} == {
        name + "_reference" for name in names
    }


WIDTH = 17  # the one channel of a table, in each of so many: a vector and a rest


def lay(case, name, numbers, dtype, device="cpu"):
    """The leaf of this name, or what has its shape, whose every channel has these numbers."""
    x, letters = torch.tensor(numbers, dtype=dtype, device=device), case.letters(name)
    x = x[None] if letters.startswith("BT") else x
    if "D" not in letters:
        return x
    d = letters.index("D")
    return x.unsqueeze(d).repeat_interleave(WIDTH, d)


def check_table(table, function, dtype, device="cpu"):
    options, case = dict(table.options), BY_NAME[table.operator]
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], device=device)
    leaves = [
        lay(case, name, x, dtype, device).requires_grad_()
        for name, x in zip(case.names, (*table.inputs, table.state), strict=True)
    ]
    f = case.bind(function, **options)
    exact, ends = table_dtype(table), (case.names[0], case.names[-1])
    for name, end, got, want in zip(
        ("h", "final_state"), ends, f(*leaves), (table.h, table.final_state), strict=True
    ):
        close(got, lay(case, end, want, exact), dtype, name=name)
    weights = [
        lay(case, end, g, dtype, device)
        for end, g in zip(ends, (table.grad_h, table.grad_final), strict=True)
    ]
    grads = gradients(f, leaves, weights=weights)
    for name, got, want in zip(case.names, grads, table.grads, strict=True):
        want = lay(case, name, want, exact)
        if "D" not in case.letters(name):  # all channels have it together
            want = WIDTH * want
        close(got, want, dtype, grad=True, name=f"gradient of {name}")


def over_tables(f):
    return pytest.mark.parametrize("table", oracle.TABLES, ids=lambda t: t.name.replace(" ", "_"))(
        f
    )


def table_dtype(table, real=torch.float64):
    return torch.complex128 if any(isinstance(x, complex) for x in table.inputs[0]) else real


@over_tables
def test_table(table):
    check_table(table, BY_NAME[table.operator].reference, table_dtype(table))


@over_tables
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_table_kernel(table, dtype, device):
    """The first thing to look at when everything is red: the operator itself on the same tables."""
    check_table(table, None, table_dtype(table, dtype), device)


@over(dtypes=(torch.float64, torch.complex128), cases=DIRECT)
@pytest.mark.parametrize("form", ["plain", "reverse", "packed", "packed_reverse"])
@pytest.mark.parametrize("formula", [oracle.closed_form, oracle.loop], ids=["closed_form", "loop"])
def test_second_formula(case, options, dtype, form, formula, generator):
    packed = [0, 0, 3, 4, 11, 11] if "packed" in form else None
    B, rows = (1, 5) if packed else (3, 3)
    options = dict(options, reverse="reverse" in form)
    leaves = case.leaves(B, 11, 2, dtype, generator, state=rows)
    arrays = [x.numpy() for x in leaves]
    want = formula(case.name, arrays[:-1], arrays[-1], cu_seqlens=packed, **options)
    if packed:
        options["cu_seqlens"] = torch.tensor(packed)
    got = case.bind(case.reference, **options)(*leaves)
    for name, g, w in zip(("h", "final_state"), got, want, strict=True):
        assert np.isfinite(w).all()
        close(g, torch.from_numpy(w), name=name)


@over(dtypes=(torch.float64, torch.complex128), cases=ALL)
def test_gradients_of_the_reference(case, options, dtype, generator):
    leaves = case.leaves(2, 3, 2, dtype, generator, grad=True)
    f = case.bind(case.reference, **options)
    assert torch.autograd.gradcheck(f, leaves, fast_mode=case.fast)


@over(dtypes="all", variants=False, cases=ALL)
def test_dtypes_of_the_reference(case, dtype, generator):
    leaves = case.leaves(2, 3, 2, dtype, generator)
    h, *finals = case.bind(case.reference)(*leaves)
    assert h.dtype is dtype
    assert [y.dtype for y in finals] == [y.dtype for y in leaves[case.inputs :]]
