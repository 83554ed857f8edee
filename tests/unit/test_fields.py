"""Fields of signatures and problems are described once: what is read, refused, written and printed follows from it."""

import json
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

import pytest

from tilewright.codegen.ops.attention.signature import AttentionSignature
from tilewright.codegen.ops.fields import Choice, Positive, Truth, Whole, described
from tilewright.codegen.ops.gating.signature import GatingSignature
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import OPS
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.errors import TilewrightError
from tilewright.tuner.cli import main

KEYS: list[tuple[type[Signature], str, str]] = [
    (MoeGemmSignature, "stage=up,experts=8,n=14336,k=4096,top_k=2,activation=swiglu", "fa0d887291b6769d319d66a1"),
    (MoeGemmSignature, "stage=down,experts=8,n=4096,k=14336,top_k=2", "585fd9387e41da6f3996f47c"),
    (MoeGemmSignature, "stage=plain,experts=1,n=4096,k=4096,bias=true", "efa948618b300a4f34ceca8f"),
    (
        MoeGemmSignature,
        "experts=32,n=2880,k=2880,top_k=4,activation=swiglu_clamped,bias=1,x_dtype=bf16",
        "c2cbf766cf0816efe680c504",
    ),
    (MoeGemmSignature, "stage=down,experts=4,n=3,k=5,x_dtype=fp16,out_dtype=fp32", "3936244c85782535d88c3ede"),
    (GatingSignature, "experts=8,top_k=2", "e96c99d6a6d10b6a8563cc63"),
    (
        GatingSignature,
        "experts=256,top_k=8,score=sigmoid,bias=true,groups=8,top_groups=4,scale=2.5,order=rows",
        "a943ac505fc4af371eee2da2",
    ),
    (
        GatingSignature,
        "experts=64,top_k=6,renormalize=false,scale=16,order=blocks,block_size=16",
        "4e18d670fe4f5744da001cc8",
    ),
    (GatingSignature, "experts=160,top_k=6,groups=8,top_groups=3", "9e810a126cadf82a2580c442"),
    (AttentionSignature, "stage=decode,heads=32,kv_heads=8,head_dim=128", "ff46d485b74b87fcdeb09cc3"),
    (
        AttentionSignature,
        "heads=64,kv_heads=8,head_dim=64,window=128,sinks=1,page_size=32,kv_layout=nhd,q_dtype=bf16,kv_dtype=fp8_e4m3",
        "d6585ea63d893531ad6ef9a5",
    ),
    (
        AttentionSignature,
        "stage=prefill,heads=16,kv_heads=16,head_dim=192,value_dim=128,scale=0.0722",
        "43bf3f780af8abc5d603fe81",
    ),
    (
        AttentionSignature,
        "heads=128,kv_heads=1,head_dim=576,value_dim=512,latent=true,scale=0.0722",
        "649c11c90dac651cf7f95f27",
    ),
    (
        AttentionSignature,
        "stage=prefill,heads=4,kv_heads=2,head_dim=16,q_dtype=fp16,out_dtype=fp32",
        "77d6b60c8308c98089897e63",
    ),
]
"""Keys of signatures as they were before fields were described: plans are found by them."""


def texts(line: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in line.split(","))


@pytest.mark.parametrize(("kind", "line", "key"), KEYS)
def test_keys_of_stored_plans_stay(kind: type[Signature], line: str, key: str) -> None:
    signature = kind.parse(texts(line))
    assert signature.key == key
    assert kind.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature


@dataclass(frozen=True, kw_only=True)
class Demo(Signature):
    op: ClassVar[str] = "demo"
    example: ClassVar[str] = "size=4"

    size: Annotated[int, Whole("How large.", 2, 64, 2)]
    part: Annotated[int, Whole("How much of it.", 1, "size")] = 1
    factor: Annotated[float, Positive("Of everything.")] = 1.0
    fast: Annotated[bool, Truth("Whether it is fast.")] = False
    colour: Annotated[Literal["red", "green"], Choice("Of it.")] = "red"
    dtype: Annotated[str, Choice("Of it.", ("fp32", "bf16"))] = "fp32"
    out_dtype: Annotated[str, Choice("Of the output.", ("fp32", "bf16"), like="dtype")] = ""
    added: Annotated[int, Whole("Which came later.", 0, 9, omitted=True)] = 0


@pytest.mark.parametrize(
    ("field", "value", "possible"),
    [
        ("size", 1, "a multiple of 2 from 2 to 64"),
        ("size", 66, "a multiple of 2 from 2 to 64"),
        ("size", 5, "a multiple of 2 from 2 to 64"),
        ("size", True, "a multiple of 2 from 2 to 64"),
        ("size", 4.0, "a multiple of 2 from 2 to 64"),
        ("size", "x", "a multiple of 2 from 2 to 64"),
        ("part", 0, "a whole number from 1 to 8"),
        ("part", 9, "a whole number from 1 to 8"),
        ("factor", 0.0, "a number above 0"),
        ("factor", float("inf"), "a number above 0"),
        ("factor", float("nan"), "a number above 0"),
        ("factor", "x", "a number above 0"),
        ("factor", True, "a number above 0"),
        ("fast", 1, "true or false"),
        ("fast", "perhaps", "true or false"),
        ("colour", "blue", "red or green"),
        ("out_dtype", "fp8", "fp32 or bf16"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_possible(field: str, value: Any, possible: str) -> None:
    with pytest.raises(TilewrightError) as refusal:
        Demo(**{"size": 8, field: value})
    assert str(refusal.value) == f"demo: {field}={value!r} is impossible; give {possible}"


@pytest.mark.parametrize(
    "values",
    [
        {"size": 2, "part": 2},
        {"size": 64, "part": 64, "factor": 0.5, "fast": True, "colour": "green", "dtype": "bf16", "added": 9},
        {"size": 8, "dtype": "bf16", "out_dtype": "fp32"},
    ],
)
def test_possible_values_go_through_texts_and_json(values: dict[str, Any]) -> None:
    signature = Demo(**values)
    assert Demo.parse({name: str(value) for name, value in values.items()}) == signature
    assert Demo.from_dict(json.loads(json.dumps(signature.to_dict()))) == signature


def test_what_stands_for_another_field_is_the_same_signature() -> None:
    assert Demo(size=4, dtype="bf16") == Demo(size=4, dtype="bf16", out_dtype="bf16", factor=1)
    assert Demo(size=4, dtype="bf16").key == Demo(size=4, dtype="bf16", out_dtype="bf16").key


def test_a_field_that_came_later_is_written_only_where_it_says_something() -> None:
    assert "added" not in Demo(size=4).to_dict()
    assert Demo(size=4, added=1).to_dict()["added"] == 1


def test_missing_and_unknown_fields_are_named() -> None:
    with pytest.raises(TilewrightError, match="--problem lacks size; give for example size=4"):
        Demo.parse({"fast": "1"})
    with pytest.raises(TilewrightError, match="demo has no field 'sizes'; its fields are size, part, factor"):
        Demo.parse({"sizes": "4"})
    with pytest.raises(TilewrightError, match="a demo signature lacks the field 'size'"):
        Demo.from_dict({"op": "demo"})
    with pytest.raises(TilewrightError, match="a demo signature has no field 'sizes'"):
        Demo.from_dict({"size": 4, "sizes": 4})


def test_a_field_without_a_description_cannot_be_forgotten() -> None:
    @dataclass(frozen=True)
    class Forgetful(Signature):
        op: ClassVar[str] = "forgetful"
        size: int = 1

    with pytest.raises(TypeError, match=r"Forgetful.size is not described"):
        Forgetful()


@pytest.mark.parametrize("name", OPS)
def test_every_field_of_an_op_has_a_meaning(name: str) -> None:
    op = OPS[name]
    assert [each.name for each in fields(op.signature_type)] == list(described(op.signature_type))
    for each in (*described(op.signature_type).values(), *described(op.problem_type).values()):
        assert each.spec.help.endswith(".")
        assert each.spec.possible()
        assert each.default is MISSING or each.spec.like or each.default == each.spec.normal(each.default)


@pytest.mark.parametrize("name", OPS)
def test_the_command_line_says_what_problems_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "native", "--op", name, "--problem", "help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    op = OPS[name]
    assert lines[0].endswith(op.problem_example)
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "]
    assert listed == [*op.problem_type.given, *described(op.signature_type)]
    assert all(len(line) <= 100 for line in lines[1:])


def test_every_op_can_be_asked_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "native", "--op", "all", "--problem", "help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--problem for {name} takes" in out for name in OPS)


def test_an_unknown_field_of_a_problem_points_to_help() -> None:
    with pytest.raises(TilewrightError) as refusal:
        OPS["gating"].parse_problem({"heads": "3"}, RoutingSpec.parse("balanced"))
    said = str(refusal.value)
    assert said.startswith("gating has no field 'heads'; --problem takes tokens, experts, top_k, score")
    assert said.endswith("--problem help says what they mean")
