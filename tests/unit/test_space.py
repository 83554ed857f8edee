"""The space: parameters, constraints, enumeration, unions and configs."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.space import Config, Constraint, Parameter, Space
from tilewright.errors import TilewrightError

TILE = Parameter("tile", (8, 16, 32), "rows of a tile")
UNROLL = Parameter("unroll", (1, 2, 4), "copies of the inner loop")
PACKED = Parameter("packed", (False, True), "weights are repacked")


def fits(limit: int) -> Constraint:
    return Constraint("fits", lambda c: c["tile"] * c["unroll"] <= limit, "the tile must fit", ("tile", "unroll"))


@st.composite
def parameters_and_constraints(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    parameters = [Parameter(f"p{i}", tuple(range(size)), "") for i, size in enumerate(sizes)]
    constraints = []
    for number in range(draw(st.integers(0, 3))):
        names = draw(st.lists(st.sampled_from([p.name for p in parameters]), min_size=1, max_size=3, unique=True))
        modulus, rest = draw(st.integers(2, 3)), draw(st.integers(0, 2))
        listed = tuple(names) if draw(st.booleans()) else ()
        holds = lambda c, names=names, m=modulus, r=rest: sum(c[n] for n in names) % m != r  # noqa: E731
        constraints.append(Constraint(f"c{number}", holds, "", listed))
    return parameters, constraints


@given(parameters_and_constraints())
def test_enumeration_keeps_exactly_what_a_full_product_keeps(drawn):
    parameters, constraints = drawn
    names = [p.name for p in parameters]
    product = [dict(zip(names, v, strict=True)) for v in itertools.product(*(p.values for p in parameters))]
    valid = [c for c in product if all(k.holds(c) for k in constraints)]
    if not valid:
        with pytest.raises(TilewrightError, match="No config is valid"):
            Space.enumerate(parameters, constraints)
        return
    space = Space.enumerate(parameters, constraints)
    assert [dict(c) for c in space] == valid
    assert space.full_size == len(product)
    assert len(space) + sum(space.removed.values()) == len(product)
    assert [space.index_of(c) for c in space] == list(range(len(space)))


def test_a_branch_is_dropped_as_soon_as_its_constraint_is_bound():
    calls = []
    early = Constraint("early", lambda c: calls.append(dict(c)) or c["tile"] == 8, "", ("tile",))
    space = Space.enumerate([TILE, UNROLL, PACKED], [early])
    assert calls == [{"tile": 8}, {"tile": 16}, {"tile": 32}]
    assert space.removed == {"early": 12}


def test_a_removed_config_counts_for_the_first_constraint_that_rejects_it():
    never = Constraint("never", lambda c: c["tile"] != 32, "", ("tile",))
    space = Space.enumerate([TILE, UNROLL], [never, fits(32)])
    assert space.removed == {"never": 3, "fits": 1}
    assert len(space) == 5


def test_indices_point_into_the_ordered_values():
    space = Space.enumerate([TILE, UNROLL], [fits(32)])
    assert space.indices.dtype == "int16"
    assert [TILE.values[i] for i in space.indices[:, 0]] == [c["tile"] for c in space]
    with pytest.raises(ValueError, match="read-only"):
        space.indices[0, 0] = 1


def test_description_shows_the_size_and_what_each_constraint_removed():
    text = Space.enumerate([TILE, UNROLL], [fits(32)]).describe()
    assert "6 valid configs of 9" in text
    assert "fits  removed         3  the tile must fit" in text


def test_a_summary_adds_up_what_constraints_of_one_name_removed():
    space = Space.enumerate([TILE, UNROLL], [fits(32)])
    assert Space.union({"a": space, "b": space}).summary() == "12 valid configs of 18; removed by fits 6"
    assert Space.enumerate([TILE]).summary() == "3 valid configs of 3"


def test_an_empty_space_names_the_constraint_that_removed_most():
    none = Constraint("none", lambda _: False, "nothing is allowed", ("unroll",))
    with pytest.raises(TilewrightError, match=r"'none' removed 6 of 9 .*nothing is allowed"):
        Space.enumerate([TILE, UNROLL], [Constraint("some", lambda c: c["tile"] > 8, "", ("tile",)), none])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parameter("tile", (), ""), "has no values"),
        (lambda: Parameter("tile", (1, True), ""), "two equal values"),
        (lambda: Space.enumerate([TILE, TILE]), "several parameters called tile"),
        (lambda: Space.enumerate([]), "at least one parameter"),
        (lambda: Space.enumerate([TILE], [fits(8)]), "names \\['unroll'\\]"),
        (
            lambda: Space.enumerate([TILE, UNROLL], [Constraint("early", lambda c: c["unroll"] > 1, "", ("tile",))]),
            "'early' reads 'unroll'",
        ),
        (lambda: Space.enumerate([TILE, UNROLL], [fits(8), fits(9)]), "share a name"),
        (lambda: Parameter("tile", (8, 16), "", default=9), "the default 9, not one of \\(8, 16\\)"),
        (lambda: Space.enumerate([TILE]).index_of({"tile": 9}), "nearest config has tile=8 where this has 9"),
        (lambda: Space.enumerate([TILE, PACKED]).index_of({"tile": 8}), "nearest config has packed=False .* 'nothing'"),
        (
            lambda: Space.enumerate([TILE]).index_of({"tile": 16, "hue": 1}),
            "nearest config has no hue, which is 1 here",
        ),
        (lambda: Space.enumerate([TILE, UNROLL], [fits(64)]).index_of({"tile": 32, "unroll": 4}), "tile=8 where .* 32"),
        (lambda: Space.union({}), "at least one template"),
        (lambda: Config({"tile": float("nan")}), "tile=nan"),
        (lambda: Config({"tile": [1]}), "tile="),
        (lambda: Config({"tile": None}), "tile=None"),
    ],
)
def test_a_mistake_gets_one_clear_sentence(make, message):
    with pytest.raises(TilewrightError, match=message):
        make()


def test_a_space_without_limits_is_refused_and_not_enumerated_for_hours(monkeypatch):
    monkeypatch.setattr("tilewright.codegen.space.MAX_CONFIGS", 5)
    with pytest.raises(TilewrightError, match="more than 5 valid configs"):
        Space.enumerate([TILE, UNROLL])


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_a_config_survives_its_canonical_text(values):
    config = Config(values)
    again = Config(json.loads(config.key()))
    assert again == config
    assert hash(again) == hash(config)
    assert again.key() == config.key()
    assert {name: type(v) for name, v in again.items()} == {name: type(v) for name, v in values.items()}


def test_a_configs_text_does_not_depend_on_the_order_of_its_names():
    assert Config({"b": 1, "a": True}).key() == Config({"a": True, "b": 1}).key() == '{"a":true,"b":1}'
    assert json.loads(Config({"ü": "x"}).key()) == {"ü": "x"}


class TestUnion:
    blocked = Space.enumerate([TILE, Parameter("unroll", (1, 4), "copies of the inner loop")])
    streaming = Space.enumerate([Parameter("unroll", (2, 4), ""), PACKED], [Constraint("even", lambda _: True, "even")])
    union = Space.union({"blocked": blocked, "streaming": streaming})

    def test_template_leads_and_a_config_has_its_own_knobs_alone(self):
        assert [p.name for p in self.union.parameters] == ["template", "tile", "unroll", "packed"]
        assert dict(self.union[0]) == {"template": "blocked", "tile": 8, "unroll": 1}
        assert dict(self.union[-1]) == {"template": "streaming", "unroll": 4, "packed": True}

    def test_shared_values_are_merged_in_order(self):
        values = {p.name: p.values for p in self.union.parameters}
        assert values["unroll"] == (1, 2, 4)
        assert values["tile"] == (None, 8, 16, 32)

    def test_sizes_and_removals_add_up_over_the_templates(self):
        assert len(self.union) == self.union.full_size == 10
        assert self.union.removed == {"streaming/even": 0}

    def test_a_part_of_some_templates_keeps_the_parameters_and_their_configs(self):
        part = self.union.of_templates(["streaming"])
        assert part.parameters == self.union.parameters
        assert list(part) == [config for config in self.union if config["template"] == "streaming"]
        assert part.full_size == len(part)
        assert "template" not in part.describe()
        assert list(self.union.of_templates(["streaming", "blocked"])) == list(self.union)

    def test_every_config_is_one_of_its_template_beside_its_name(self):
        made = [Config.of("blocked", own) for own in self.blocked] + [
            Config.of("streaming", own) for own in self.streaming
        ]
        assert made == list(self.union)
        assert [self.union.find(config) for config in made] == list(range(len(self.union)))

    def test_a_config_with_a_knob_of_another_template_is_no_part_of_it(self):
        assert Config({**self.union[0], "packed": True}) not in self.union
        assert Config({name: value for name, value in self.union[0].items() if name != "tile"}) not in self.union

    def test_the_nearest_config_to_a_stranger_is_one_of_its_template(self):
        near_the_other = {"template": "blocked", "unroll": 2, "packed": True}
        with pytest.raises(TilewrightError, match=r"tile=8 .* 'nothing'; unroll=1 .* 2; no packed, which is True"):
            self.union.index_of(near_the_other)

    def test_configs_written_with_none_for_absent_knobs_are_read(self):
        for config in self.union:
            padded = {p.name: config.get(p.name) for p in self.union.parameters}
            assert self.union.read(padded) == config
            assert self.union.find(padded) == self.union.find(config)

    def test_a_reserved_name_or_value_in_a_template_is_refused(self):
        for bad in (Parameter("template", ("x",), ""), Parameter("tile", (None, 8), "")):
            with pytest.raises(TilewrightError, match="are kept for the union"):
                Space.union({"bad": Space.enumerate([bad])})

    def test_a_knob_that_is_a_number_here_and_a_bool_there_is_refused(self):
        with pytest.raises(TilewrightError, match="two equal values"):
            Space.union({"a": self.streaming, "b": Space.enumerate([Parameter("packed", (0, 1), "")])})


class TestDefault:
    """A knob that is newer than what is stored: its default is the value at which nothing changes."""

    old = Space.enumerate([TILE, UNROLL], [fits(32)])
    new = Space.enumerate([TILE, UNROLL, Parameter("alias", (True, False), "", default=False)], [fits(32)])
    other = Space.enumerate([TILE, Parameter("alias", (True, False), "")])
    union = Space.union({"new": new, "other": other})

    def test_a_config_that_does_not_name_it_has_its_default(self):
        for config in self.old:
            assert self.new.read(config) == Config({**config, "alias": False})
            assert self.new[self.new.index_of(config)] == self.new.read(config)

    def test_a_config_that_names_it_keeps_its_own(self):
        for config in self.new:
            assert self.new.read(config) == config

    def test_it_is_the_default_of_its_own_template_alone(self):
        parts = [self.union, self.union.of_templates(["new", "other"]), self.union.only(self.union.indices[:, 0] >= 0)]
        for union in parts:
            assert union.read({"template": "new", "tile": 8}) == Config({"template": "new", "tile": 8, "alias": False})
            assert union.read({"template": "other", "tile": 8}) == Config({"template": "other", "tile": 8})
            assert union.find({"template": "new", "tile": 8, "unroll": 1}) is not None
            assert union.find({"template": "other", "tile": 8}) is None
