"""Runs one case of the fuzzer, and says where the library disagrees with the truth."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from benchmark.fuzz_case import Case, draw_gradients, make_tensors
from benchmark.fuzz_layouts import layout, memory
from benchmark.fuzz_operators import OPERATORS, call
from benchmark.fuzz_oracle import Truth
from benchmark.fuzz_tolerance import Tolerance

GIVEN = {"out": "output", "cross_token_qk_out": "col_sum", "cross_token_softmax_out": "weight_sum"}  # buffers: fields


class Verdict(NamedTuple):
    """What became of a case."""

    number: int
    operator: str
    backend: str
    device: str
    kind: str  # "values", "gradients" or "refused"
    faults: tuple[str, ...]  # what disagrees; none where all is right
    closest: float  # the largest error as a share of what is allowed
    lines: tuple[str, ...] = ()  # the case in words, where it was asked for or something disagrees


def check_case(case: Case, in_detail: bool = False) -> Verdict:
    """Run a case; whatever it raises is a disagreement, unless it must be refused."""
    tensors = make_tensors(case)
    found = _Findings()
    kind = "refused" if case.refused else "values"
    try:
        if case.refused:
            _check_refusal(case, tensors, found)
        else:
            kind = _check_results(case, tensors, found)
    except Exception as error:
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        place = f"{where.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{where.tb_lineno}"
        found.faults.append(f"raised {type(error).__name__} at {place}: {str(error)[:300]}")
    lines = _describe(case, tensors, found) if in_detail or found.faults else ()
    return Verdict(
        case.number, case.operator, case.backend, case.device, kind, tuple(found.faults), found.closest, lines
    )  # fmt: skip


class _Findings:
    """Faults, and how close right results came to being wrong."""

    def __init__(self):
        self.faults, self.compared, self.closest = [], [], 0.0

    def compare(self, name: str, actual: Tensor, expected: Tensor, slack: Tensor, dtype: torch.dtype) -> None:
        """Compare element by element with the truth; infinities must agree."""
        if actual.shape != expected.shape or actual.dtype != dtype:
            self.faults.append(
                f"{name} is {list(actual.shape)} {actual.dtype}, expected {list(expected.shape)} {dtype}"
            )
            return
        if not actual.numel():
            return
        actual, expected = actual.detach().cpu().double(), expected.detach()
        allowed = slack.detach() + 2 * torch.finfo(dtype).eps * expected.abs().masked_fill(expected.isinf(), 0)
        error = (actual - expected).abs().masked_fill(actual == expected, 0).nan_to_num(nan=math.inf)
        share = error / allowed.clamp(min=1e-300)
        worst = share.argmax()
        at = [int(x) for x in torch.unravel_index(worst, share.shape)]
        largest = share.flatten()[worst].item()
        values = [x.expand_as(share).flatten()[worst].item() for x in (actual, expected, allowed)]
        text = "{} at {}: {:.9g}, expected {:.9g}, allowed ±{:.3g}".format(name, at, *values)
        self.compared.append(f"{text}  ({largest:.2f} of it)")
        self.closest = max(self.closest, largest)
        if not largest <= 1:
            self.faults.append(f"{text}; {int((share > 1).sum())} of {share.numel()} elements are off")


def _check_refusal(case: Case, tensors: dict[str, Tensor], found: _Findings) -> None:
    """Check that a wrong argument raises an error that names it."""
    name, value = case.refused
    tensors, keywords, own = dict(tensors), dict(case.keywords), dict(case.own)
    tensors.pop(name, None)
    if name == "sinks" and value == "wrong shape":
        tensors["sinks"] = torch.zeros(case.sizes.n_kv_heads * case.sizes.group + 1, device=tensors["q"].device)
    elif name == "key_padding_mask":
        shape = (case.sizes.batch, case.sizes.n_k + (value == "wrong shape"))
        dtype = torch.bool if value == "wrong shape" else torch.float32
        tensors[name] = torch.ones(shape, dtype=dtype, device=tensors["q"].device)
    elif name in keywords or name in ("dropout_p", "seed", "window", "softcap", "sinks"):
        keywords[name] = value
    else:
        own[name] = value
    try:
        call(case.operator, tensors, keywords, own)
    except (TypeError, ValueError) as error:
        known_as = "scale" if name == "sm_scale" else name.removesuffix("_start")
        if known_as not in str(error):
            found.faults.append(f"{name}={value!r} is refused without naming it: {error}")
    else:
        found.faults.append(f"{name}={value!r} is accepted")


def _check_results(case: Case, tensors: dict[str, Tensor], found: _Findings) -> str:
    """Check results, gradients, and that nothing else was written; return the kind of the case."""
    inputs = {name: x for name, x in tensors.items() if name not in GIVEN}
    before = {name: memory(x).clone() for name, x in inputs.items()}
    results = call(case.operator, tensors, case.keywords, case.own)
    truth, tolerance = _truth(case, tensors)
    wide = torch.promote_types(case.dtype, torch.float32)
    for name, x in results.items():
        expected, slack = getattr(truth, name)(), tolerance.of(name)
        if name == "weight_sum" and "cumulative_scores" in tensors:
            earlier = tensors["cumulative_scores"].cpu().double()
            earlier = torch.nn.functional.pad(earlier, (0, case.sizes.n_k - earlier.shape[2]))
            expected, slack = expected + earlier, slack + tolerance.wide * earlier.abs()
        found.compare(name, x, expected, slack, case.dtype if name in ("output", "scores") else wide)
    for argument, field in GIVEN.items():
        if argument in tensors:
            _check_buffer(argument, tensors[argument], results[field], found)
    gradients = draw_gradients(case, results) if case.gradients_of else {}
    if gradients:
        kept = {name: memory(x).clone() for name, x in gradients.items()}
        _check_gradients(case, tensors, results, gradients, truth, tolerance, found)
        inputs, before = inputs | gradients, before | kept
    for name, x in inputs.items():
        if not torch.equal(memory(x), before[name]):
            found.faults.append(f"{name} was written to")
    return "gradients" if gradients else "values"


def _truth(case: Case, tensors: dict[str, Tensor]) -> tuple[Truth, Tolerance]:
    """Return the truth, with tensors of its own that require gradients where the case's do, and its tolerance."""
    exact = {
        name: x.detach().cpu().double().requires_grad_(x.requires_grad)
        for name, x in tensors.items()
        if name in ("q", "k", "v", "sinks")
    }
    padding = tensors.get("key_padding_mask")
    options = {name: x for name, x in case.keywords.items() if name != "backend"}
    if not OPERATORS[case.operator].options:
        options = {"causal": case.keywords["causal"]}
    region = OPERATORS[case.operator].region(case.own, case.sizes)
    truth = Truth(**exact, padding=None if padding is None else padding.cpu(), **options, region=region)
    with torch.no_grad():
        tolerance = Tolerance(truth, case.dtype, buffered="buffered" in case.operator)
    return truth, tolerance


def _check_buffer(name: str, buffer: Tensor, result: Tensor, found: _Findings) -> None:
    """Check that a given buffer is what was returned, and that no element around it was written."""
    if result.data_ptr() != buffer.data_ptr():
        found.faults.append(f"{name} was given and another tensor returned")
    around = buffer.new_empty(0).set_(buffer.untyped_storage()).clone()
    around[buffer.storage_offset() : buffer.storage_offset() + buffer.numel()] = torch.nan
    if not around.isnan().all():
        found.faults.append(f"memory around {name} was written to")


def _check_gradients(case, tensors, results, gradients, truth, tolerance, found) -> None:
    """Compare the gradients of the case's inputs with autograd's of the truth."""
    wanted = case.gradients_of
    fields = list(gradients)
    attached = [name for name in fields if results[name].requires_grad]
    if not attached:
        found.faults.append("no result requires gradients")
        return
    leaves = [tensors[name] for name in wanted]
    outputs, incoming = [results[name] for name in attached], [gradients[name] for name in attached]
    actual = torch.autograd.grad(outputs, leaves, incoming, allow_unused=True)
    exact = {name: x.detach().cpu().double() for name, x in gradients.items()}
    true = {name: getattr(truth, name)() for name in fields}
    reached = [name for name in fields if true[name].requires_grad]
    expected = [None] * len(wanted)
    if reached:
        sources = [getattr(truth, name) for name in wanted]
        expected = torch.autograd.grad(
            [true[name] for name in reached], sources, [exact[name] for name in reached], allow_unused=True
        )
    with torch.no_grad():
        slacks = tolerance.of_gradients(exact)
    for name, leaf, got, right in zip(wanted, leaves, actual, expected, strict=True):
        right = torch.zeros(leaf.shape, dtype=torch.float64) if right is None else right
        got = torch.zeros_like(leaf) if got is None else got
        through = f"gradient of {name} through {' and '.join(fields)}"
        found.compare(through, got, right, slacks[name], leaf.dtype)


def _describe(case: Case, tensors: dict[str, Tensor], found: _Findings) -> tuple[str, ...]:
    """Return the case in words: arguments, layouts, and what was compared."""
    arguments = ", ".join(f"{name}={x!r}" for name, x in (case.keywords | case.own).items())
    lines = [f"case {case.number}: {case.operator}({arguments}) on {case.device}"]
    lines += [f"  {name}: {layout(x)}{' requires grad' if x.requires_grad else ''}" for name, x in tensors.items()]
    return *lines, *(f"  {line}" for line in found.compared), *(f"  WRONG: {line}" for line in found.faults)
