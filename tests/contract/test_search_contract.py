"""What every search promises; a search added to SEARCHES is held to it without a line here."""

from collections.abc import Callable

import pytest

from tilewright.codegen.space import Config, Constraint, Parameter, Space
from tilewright.errors import TilewrightError
from tilewright.tuner.search import SEARCHES, Prior, Search, SearchExhausted, TuningStudy, make_search

PARAMETERS = (
    Parameter("tile", (8, 16, 24, 32), "rows of a tile"),
    Parameter("unroll", (None, 1, 2, 4), "copies of the inner loop"),
    Parameter("schedule", ("static", "dynamic", "guided"), "how threads share the work"),
    Parameter("packed", (False, True), "weights are repacked"),
    Parameter("fixed", (64,), "a knob with nothing to choose"),
)
SPACE = Space.enumerate(
    PARAMETERS, [Constraint("fits", lambda c: c["tile"] * (c["unroll"] or 1) <= 32, "", ("tile", "unroll"))]
)
SMALL = Space.enumerate(PARAMETERS[2:])


def time_of(config: Config) -> float:
    """A smooth bowl with one best config: tile 24, unroll 1, guided, packed."""
    slower = abs(config["tile"] - 24) / 8 + abs((config["unroll"] or 3) - 1) + 2 * (not config["packed"])
    return 50.0 + 10 * slower + 5 * ("guided", "static", "dynamic").index(config["schedule"])


def run(search: Search, count: int, result: Callable[[Config], float | None] = time_of) -> list[Config]:
    asked = []
    for _ in range(count):
        asked.append(search.ask())
        search.tell(asked[-1], result(asked[-1]))
    return asked


class SearchContract:
    """Inherited with a `make` that builds the search under test."""

    @staticmethod
    def make(space: Space, **options) -> Search:
        raise NotImplementedError

    def test_every_config_is_asked_exactly_once_and_then_it_says_so(self):
        search = self.make(SPACE, seed=0, budget=20)
        assert sorted(c.key() for c in run(search, len(SPACE))) == sorted(c.key() for c in SPACE)
        for _ in range(2):
            with pytest.raises(SearchExhausted):
                search.ask()

    def test_equal_seeds_ask_equally_and_others_do_not(self):
        runs = [run(self.make(SPACE, seed=seed, budget=25), 25) for seed in (1, 1, 2)]
        assert runs[0] == runs[1]
        assert runs[0] != runs[2]

    def test_outstanding_asks_are_all_different(self):
        search = self.make(SPACE, seed=3, budget=40)
        run(search, 15)
        outstanding = [search.ask() for _ in range(8)]
        assert len(set(outstanding)) == 8
        for config in reversed(outstanding):
            search.tell(config, time_of(config))
        assert not set(outstanding) & set(run(search, 10))

    def test_everything_may_be_outstanding(self):
        search = self.make(SMALL, seed=3, budget=6)
        assert {search.ask() for _ in SMALL} == set(SMALL)

    def test_failures_alone_do_not_stop_it(self):
        search = self.make(SPACE, seed=4, budget=30)
        assert len(set(run(search, len(SPACE), lambda _: None))) == len(SPACE)

    def test_failures_among_equal_times_do_not_stop_it(self):
        search = self.make(SPACE, seed=4, budget=30)
        assert len(set(run(search, 40, lambda c: None if c["packed"] else 7.0))) == 40

    def test_a_told_config_is_not_asked_again(self):
        search = self.make(SMALL, seed=5, budget=6)
        told = SMALL[2]
        search.tell(told, 10.0)
        assert set(run(search, len(SMALL) - 1, lambda _: 20.0)) == set(SMALL) - {told}
        with pytest.raises(SearchExhausted):
            search.ask()

    def test_telling_alone_brings_a_resumed_search_to_the_end(self):
        first = self.make(SPACE, seed=6, budget=40)
        tried = run(first, 25)
        resumed = self.make(SPACE, seed=6, budget=40)
        for config in tried:
            resumed.tell(config, time_of(config))
        assert set(run(resumed, len(SPACE) - 25)) == set(SPACE) - set(tried)

    def test_a_second_tell_corrects_the_first(self):
        search = self.make(SPACE, seed=7, budget=40)
        config = run(search, 15)[0]
        search.tell(config, None)
        search.tell(config, 12.0)
        assert config not in run(search, 20)

    def test_a_config_of_another_space_has_no_influence(self):
        runs = []
        for strangers in ([], [Config({"tile": 7}), Config({**SPACE[0], "tile": 1024})]):
            search = self.make(SPACE, seed=8, budget=25)
            for stranger in strangers:
                search.tell(stranger, 1.0)
            runs.append(run(search, 20))
        assert runs[0] == runs[1]

    @pytest.mark.parametrize("time_us", [0.0, -1.0, float("nan"), float("inf")])
    def test_an_impossible_time_is_refused(self, time_us):
        search = self.make(SPACE, seed=9, budget=5)
        with pytest.raises(ValueError, match="time_us must be"):
            search.tell(search.ask(), time_us)

    def test_the_best_of_each_prior_is_asked_first(self):
        best_of_each = [SPACE[3], SPACE[9]]
        stranger = Config({"tile": 7})
        priors = [
            Prior("other size", ((SPACE[1], 9.0), (best_of_each[0], 2.0))),
            Prior("other device", ((stranger, 1.0), (best_of_each[1], 70.0), (SPACE[5], 80.0))),
        ]
        asked = run(self.make(SPACE, seed=10, budget=25, priors=priors), 8)
        assert set(best_of_each) <= set(asked[:4])
        assert asked[0] == best_of_each[0]
        assert stranger not in asked

    def test_a_prior_of_one_result_or_of_none_is_welcome(self):
        priors = [Prior("nothing", ()), Prior("one", ((SPACE[4], 3.0),))]
        asked = run(self.make(SPACE, seed=11, budget=20, priors=priors), 20)
        assert asked[0] == SPACE[4]
        assert len(set(asked)) == 20

    def test_a_space_of_one_config_is_searched(self):
        one = Space.enumerate([Parameter("tile", (8,), "")])
        search = self.make(one, seed=0, budget=10)
        assert search.ask() == Config({"tile": 8})
        with pytest.raises(SearchExhausted):
            search.ask()


def contract_of(name: str) -> type[SearchContract]:
    """The contract's tests for one registered search."""

    def make(space: Space, **options) -> Search:
        return make_search(name, space, **options)

    return type(f"Test_{name}", (SearchContract,), {"make": staticmethod(make)})


globals().update({f"Test_{name}": contract_of(name) for name in SEARCHES})


class TestTuningStudy(SearchContract):
    """The study around a search is a search."""

    @staticmethod
    def make(space: Space, **options) -> Search:
        return TuningStudy(space, make_search("random", space, **options), name="run", problem="p")


def test_an_unknown_search_is_refused_by_name():
    with pytest.raises(TilewrightError, match=r"no search called 'genetic'; choose one of gp, random, tpe"):
        make_search("genetic", SPACE, seed=0, budget=1)
