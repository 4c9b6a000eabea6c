"""The list of operators, the dispatcher and the Python functions say the same."""

import doctest
import inspect

import pytest
import torch
from cases import ALL, INNER, MATRICES, OTHERS, over
from torch._C import _dispatch_get_all_op_names, _dispatch_has_kernel_for_dispatch_key

import torch_ext

# Made of other operators: of test_mamba.py and test_fuzz.py.
LAYER_STEPS = {"torch_ext::mamba_step", "torch_ext::mamba_step_"}


def registered():
    return {n.split(".")[0] for n in _dispatch_get_all_op_names() if n.startswith("torch_ext::")}


def test_every_registered_operator_is_listed_and_the_other_way_round():
    listed = set().union(*(case.operators for case in ALL))
    listed |= LAYER_STEPS | INNER
    assert registered() - listed == set(), "registered, but no Case in tests/cases.py tests it"
    assert listed - registered() == set(), "listed in tests/cases.py, but not registered"


def test_the_list_tells_its_entries_apart():
    assert len({case.name for case in ALL}) == len(ALL)
    for case in ALL:
        assert torch.float64 in case.dtypes and torch.float32 in case.dtypes
        assert len({tuple(v.items()) for v in case.variants}) == len(case.variants)


OPTIONS = {
    "activation": ("str activation", '="identity"'),
    "normalize": ("bool normalize", "=True"),
}


@over(variants=False)
def test_schemas(case):
    """As written in the interface: saved programs and C++ callers depend on every word."""
    inputs = ", ".join(f"Tensor {name}" for name in case.arguments)
    options = [OPTIONS[name] for name in case.variants[0]]
    with_default = "".join(f", {kind}{default}" for kind, default in options)
    without = "".join(f", {kind}" for kind, _ in options)
    grads = ", ".join(f"Tensor grad_{name}" for name in (*case.arguments, "initial_state"))
    name = f"torch_ext::{case.name}"
    gradients = "Tensor? grad_h, Tensor? grad_final_state"
    step = f"Tensor state, Tensor? state_indices=None{with_default}"
    want = {
        "": f"{name}({inputs}, Tensor? initial_state=None, Tensor? cu_seqlens=None{with_default}, "
        "bool reverse=False) -> (Tensor h, Tensor final_state)",
        "_backward": f"{name}_backward({gradients}, {inputs}, Tensor h, Tensor? initial_state, "
        f"Tensor? cu_seqlens{without}, bool reverse) -> ({grads})",
        "_step": f"{name}_step({inputs}, {step}) -> (Tensor, Tensor)",
        "_step_": f"{name}_step_({inputs}, {step.replace('Tensor', 'Tensor(a!)', 1)}) -> Tensor",
    }
    for tail, schema in want.items():
        found = getattr(torch.ops.torch_ext, case.name + tail).default._schema
        want_schema = torch._C.parse_schema(schema)
        # the names of what comes back are free
        assert str(found).split(" -> ")[0] == str(want_schema).split(" -> ")[0]
        assert [str(r.type) for r in found.returns] == [str(r.type) for r in want_schema.returns]


LAYER = (
    "Tensor x, Tensor in_proj_weight, Tensor? in_proj_bias, Tensor conv_weight, "
    "Tensor? conv_bias, Tensor x_proj_weight, Tensor dt_proj_weight, Tensor? dt_proj_bias, "
    "Tensor A_log, Tensor? D, Tensor out_proj_weight, Tensor? out_proj_bias, "
)
MATRIX = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay{0}, Tensor? log_input{0}, "
    "Tensor? input_scale{0}, "
)
SCHEMAS = {
    "causal_conv1d": "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, "
    "Tensor? cu_seqlens=None, str? activation=None) -> (Tensor y, Tensor final_state)",
    "causal_conv1d_backward": "(Tensor? grad_y, Tensor? grad_final_state, Tensor x, Tensor weight, "
    "Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, str? activation) -> (Tensor grad_x, "
    "Tensor grad_weight, Tensor grad_bias, Tensor grad_initial_state)",
    "causal_conv1d_step": "(Tensor x, Tensor weight, Tensor? bias, Tensor state, "
    "Tensor? state_indices=None, str? activation=None) -> (Tensor y, Tensor state)",
    "causal_conv1d_step_": "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, "
    "Tensor? state_indices=None, str? activation=None) -> Tensor y",
    "selective_scan": "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
    "Tensor? z=None, Tensor? delta_bias=None, Tensor? initial_state=None, "
    "Tensor? cu_seqlens=None, bool delta_softplus=False, bool reverse=False, "
    "bool checkpoints=False) -> (Tensor y, Tensor final_state, Tensor kept)",
    "selective_scan_backward": "(Tensor? grad_y, Tensor? grad_final_state, Tensor u, "
    "Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor kept, Tensor? cu_seqlens, bool delta_softplus, "
    "bool reverse) -> (Tensor grad_u, Tensor grad_delta, Tensor grad_A, Tensor grad_B, "
    "Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_delta_bias, "
    "Tensor grad_initial_state)",
    "selective_scan_step": "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? delta_bias, Tensor state, Tensor? state_indices=None, "
    "bool delta_softplus=False) -> (Tensor y, Tensor state)",
    "selective_scan_step_": "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? delta_bias, Tensor(a!) state, Tensor? state_indices=None, "
    "bool delta_softplus=False) -> Tensor y",
    "mlstm": "(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? C=None, "
    "Tensor? n=None, Tensor? m=None, Tensor? cu_seqlens=None, float? scale=None, "
    'float eps=9.9999999999999995e-07, str input_gate="exp", bool normalize=True, '
    "bool normalizer_grad=True, bool reverse=False) -> (Tensor h, Tensor C, Tensor n, Tensor m)",
    "mlstm_step": "(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor C, Tensor n, "
    "Tensor m, Tensor? state_indices=None, float? scale=None, float eps=9.9999999999999995e-07, "
    'str input_gate="exp", bool normalize=True, bool normalizer_grad=True) -> (Tensor h, '
    "Tensor C, Tensor n, Tensor m)",
    "mlstm_step_": "(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor(a!) C, "
    "Tensor(b!) n, Tensor(c!) m, Tensor? state_indices=None, float? scale=None, "
    'float eps=9.9999999999999995e-07, str input_gate="exp", bool normalize=True) -> Tensor h',
    "linear_attention": "(Tensor q, Tensor k, Tensor v, Tensor? S=None, Tensor? z=None, "
    'Tensor? cu_seqlens=None, float scale=1., str feature_map="elu", bool normalize=True, '
    "float eps=9.9999999999999995e-07, bool reverse=False) -> (Tensor h, Tensor S, Tensor z)",
    "linear_attention_step": "(Tensor q, Tensor k, Tensor v, Tensor S, Tensor z, "
    'Tensor? state_indices=None, float scale=1., str feature_map="elu", bool normalize=True, '
    "float eps=9.9999999999999995e-07) -> (Tensor h, Tensor S, Tensor z)",
    "linear_attention_step_": "(Tensor q, Tensor k, Tensor v, Tensor(a!) S, Tensor(b!) z, "
    'Tensor? state_indices=None, float scale=1., str feature_map="elu", bool normalize=True, '
    "float eps=9.9999999999999995e-07) -> Tensor h",
    "retention": "(Tensor q, Tensor k, Tensor v, Tensor? decay=None, "
    "Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None, "
    "bool reverse=False) -> (Tensor h, Tensor final_state)",
    "retention_step": "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor state, "
    "Tensor? state_indices=None, float? scale=None) -> (Tensor h, Tensor state)",
    "retention_step_": "(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor(a!) state, "
    "Tensor? state_indices=None, float? scale=None) -> Tensor h",
    "ssd": "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
    "Tensor? dt_bias=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, "
    "bool dt_softplus=False, bool reverse=False) -> (Tensor y, Tensor final_state)",
    "ssd_step": "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor state, Tensor? state_indices=None, bool dt_softplus=False) -> "
    "(Tensor y, Tensor state)",
    "ssd_step_": "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor(a!) state, Tensor? state_indices=None, bool dt_softplus=False) -> "
    "Tensor y",
    "matrix_memory": f"({MATRIX.format('=None')}Tensor? C=None, Tensor? n=None, Tensor? m=None, "
    'Tensor? cu_seqlens=None, float scale=1., float eps=0., str normalizer="none", '
    "bool exact=True, bool reverse=False, bool wide_h=False, bool checkpoints=False) -> "
    "(Tensor h, Tensor C, Tensor n, Tensor m, Tensor kept)",
    "matrix_memory_backward": "(Tensor? grad_h, Tensor? grad_C, Tensor? grad_n, Tensor? grad_m, "
    f"{MATRIX.format('')}Tensor? C, Tensor? n, Tensor? m, Tensor kept, Tensor? cu_seqlens, "
    "float scale, float eps, str normalizer, bool exact, bool reverse, bool wide_h) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_log_decay, "
    "Tensor grad_log_input, Tensor grad_input_scale, Tensor grad_C, Tensor grad_n, "
    "Tensor grad_m)",
    "matrix_memory_step_": f"({MATRIX.format('')}Tensor(a!) C, Tensor(b!)? n, Tensor(c!)? m, "
    'Tensor? state_indices=None, float scale=1., float eps=0., str normalizer="none", '
    "bool wide_h=False) -> Tensor h",
    "mamba_step": f"({LAYER}Tensor conv_state, Tensor scan_state, Tensor? state_indices=None) -> "
    "(Tensor y, Tensor conv_state, Tensor scan_state)",
    "mamba_step_": f"({LAYER}Tensor(a!) conv_state, Tensor(b!) scan_state, "
    "Tensor? state_indices=None) -> Tensor y",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_of_the_others(name):
    """And the signatures of their functions: the same arguments with the same defaults."""
    schema = getattr(torch.ops.torch_ext, name).default._schema
    assert str(schema) == f"torch_ext::{name}{SCHEMAS[name]}"
    if f"torch_ext::{name}" in INNER:
        assert not hasattr(torch_ext, name)
        return
    if name.endswith("_backward"):
        return
    parameters = dict(inspect.signature(getattr(torch_ext, name)).parameters)
    arguments = {a.name: a for a in schema.arguments if a.name != "checkpoints"}
    matrix = next((c for c in MATRICES if c.name == name.split("_step")[0]), None)
    if matrix is not None and len(matrix.states) > 1:  # one argument in Python: a tuple
        tensors = [arguments.pop(state) for state in matrix.states]
        state = parameters.pop("state" if "_step" in name else "initial_state")
        optional = state.default is None
        assert all(a.has_default_value() == optional for a in tensors)
    if name.startswith("mamba"):  # one argument in Python: a pair
        assert parameters.pop("state").default is inspect.Parameter.empty
        del arguments["conv_state"], arguments["scan_state"]
    # Python has its options after the states and before cu_seqlens, as the recurrences
    assert set(parameters) == set(arguments)
    options = ["activation", "delta_softplus", "cu_seqlens", "reverse"]
    if f"{name}_step" in SCHEMAS and not name.startswith("mamba"):
        assert list(parameters)[-2:] == [n for n in options if n in parameters][-2:]
        reference = getattr(torch_ext, name + "_reference")
        mine = inspect.signature(getattr(torch_ext, name)).parameters
        assert inspect.signature(reference).parameters == mine
    else:
        assert list(parameters) == list(arguments)
    for key, argument in arguments.items():
        given = parameters[key].default is not inspect.Parameter.empty
        assert given == argument.has_default_value()
        assert not given or parameters[key].default == argument.default_value


def test_the_table_of_schemas_is_whole():
    listed = set().union(*(case.operators for case in OTHERS + MATRICES))
    assert {f"torch_ext::{name}" for name in SCHEMAS} == listed | LAYER_STEPS | INNER


@pytest.mark.parametrize("name", sorted(INNER))
def test_the_kernels_of_all_matrix_memories(name):
    """One operator has them, for every device and derivative: its members have none."""
    for key in ("CPU", "CUDA", "Meta", "Autograd"):
        assert _dispatch_has_kernel_for_dispatch_key(name, key), key
    assert not _dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    op = getattr(torch.ops.torch_ext, name.removeprefix("torch_ext::")).default
    assert torch.Tag.pt2_compliant_tag in op.tags


@over(cases=MATRICES)
def test_members_call_the_one_operator(case, options, generator):
    """Forwards, backwards and in a step; and nothing else of torch_ext."""

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    x, seen = case.leaves(2, 5, 3, torch.float32, generator, grad=True), set()
    with Seen():
        sum(y.sum() for y in case.bind(**options)(*x)).backward()
    ours = {name for name in seen if name.startswith("torch_ext::")}
    assert ours == {"torch_ext::matrix_memory", "torch_ext::matrix_memory_backward"}
    seen.clear()
    with Seen(), torch.no_grad():
        case.step_(*case.at(x, 0), **options)
    assert {n for n in seen if n.startswith("torch_ext::")} == {"torch_ext::matrix_memory_step_"}


@over(variants=False, cases=ALL)
@pytest.mark.parametrize("tail", ["", "_backward", "_step", "_step_"])
def test_kernels_are_registered_in_cpp(case, tail):
    """Python registrations do not exist in a C++ program."""
    if case in MATRICES and tail == "_backward":
        pytest.skip("that of matrix_memory")
    name = f"torch_ext::{case.name}{tail}"
    has = {
        key: _dispatch_has_kernel_for_dispatch_key(name, key)
        for key in ("CPU", "Meta", "Autograd", "CompositeImplicitAutograd")
    }
    assert has["CompositeImplicitAutograd"] or (has["CPU"] and has["Meta"]), has
    if not tail:
        own = has["CPU"] and has["Meta"] and has["Autograd"]
        assert own or (case in MATRICES and has["CompositeImplicitAutograd"]), has
    if tail != "_backward":
        for key in ("AutocastCPU", "AutocastCUDA"):
            assert _dispatch_has_kernel_for_dispatch_key(name, key), key
    dump = torch._C._dispatch_dump(name)
    assert "/dev/null" not in dump and ".py" not in dump.split("FuncTorchBatched")[0], dump
    tags = getattr(torch.ops.torch_ext, case.name + tail).default.tags
    assert torch.Tag.pt2_compliant_tag in tags


@over(variants=False)
def test_python_signatures(case):
    """Tensors, then options, in the order of the interface, with the defaults of the schema."""
    schema = {a.name: a for a in case.op._schema.arguments}
    options = [n for n in schema if n in case.variants[0]]
    sequence = [*case.arguments, "initial_state", *options, "cu_seqlens", "reverse"]
    step = [*case.arguments, "state", "state_indices", *options]
    for f, want in (
        (case.function, sequence),
        (case.reference, sequence),
        (case.step, step),
        (case.step_, step),
    ):
        parameters = inspect.signature(f).parameters
        assert list(parameters) == want, f.__name__
        for name, parameter in parameters.items():
            required = name in case.arguments or name == "state"
            default = inspect.Parameter.empty if required else schema.get(name)
            if name == "state_indices":
                assert parameter.default is None
            elif not required:
                assert parameter.default == default.default_value
            else:
                assert parameter.default is default
        assert f.__name__ in torch_ext.__all__ and f.__module__.startswith("torch_ext")


EXAMPLES = [c.name + tail for c in ALL for tail in ("", "_step", "_step_", "_reference")]


@pytest.mark.parametrize("name", [*EXAMPLES, "mamba_step", "mamba_step_"])
def test_examples_in_the_documentation(name):
    f = getattr(torch_ext, name)
    finder = doctest.DocTestFinder(recurse=False)
    tests = finder.find(
        f, f.__name__, globs={"torch": torch, "torch_ext": torch_ext} | vars(torch_ext)
    )
    assert any(test.examples for test in tests), "has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in tests:
        assert runner.run(test).failed == 0
